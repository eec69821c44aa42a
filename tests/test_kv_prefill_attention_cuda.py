# SPDX-License-Identifier: Apache-2.0
"""Attention of whole prompts on the GPU: by cuDNN and by FlashAttention 2, one and several."""

import pytest
import reference
import test_kv_cache_attention as cpu_cache
import torch
from compare import assert_bits_equal, assert_float_error
from kv_cases import filled_cache
from prefixquant import _C, ops

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)

from prefixquant.ops import kv_prefill_attention_cuda as module  # noqa: E402


def make_inputs(heads, counts, dtype, prefix, starts=None, page_size=None):
    """(arguments of kv_prefill_attention on the CPU, the pages of every sequence)"""
    starts = [0] * len(counts) if starts is None else starts
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    inputs, _ = cpu_cache.make_inputs(heads, 4, dtype, [1] * len(counts), prefix)
    inputs = {n: v for n, v in inputs.items() if n not in ("lengths", "max_length")}
    names = ("k_cache", "v_cache", "block_table")
    *cache, pages = filled_cache(
        lengths, *heads[1:], 4, dtype, page_size, capacity=max(lengths) + 5
    )
    inputs.update(zip(names, cache, strict=True))
    q = torch.randn(sum(counts), heads[0], heads[2]).to(dtype)
    return inputs | {"q": q, "start": starts, "counts": counts}, pages


def on_gpu(inputs):
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def check(inputs, pages):
    """Against float64 on the CPU; returns the result."""
    out = ops.kv_prefill_attention(**on_gpu(inputs)).cpu()
    pieces = zip(inputs["q"].split(inputs["counts"]), inputs["start"], strict=True)
    pairs = [
        cpu_cache.expected(inputs, pages, q, b, start + len(q))
        for b, (q, start) in enumerate(pieces)
    ]
    exact, own = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert out.isfinite().all()
    assert_float_error(out, own, exact, atol=2e-6)
    return out


@pytest.fixture(params=["cudnn", "flash"])
def backend(request, monkeypatch):
    """Makes one of the two take every prompt of more than a few tokens; counts its calls."""
    if request.param == "cudnn" and not module._cudnn_is_there(0):
        pytest.skip("needs cuDNN and a Hopper GPU")
    monkeypatch.setattr(module, "_CUDNN_LEAST_WORK", 0 if request.param == "cudnn" else 1 << 62)
    calls = []
    for name in ("_attend_cudnn", "_attend_equal", "_attend_ragged"):
        function = getattr(module, name)

        def counted(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    return {"cudnn": "_attend_cudnn", "flash": "_attend_equal"}[request.param], calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("heads", [(8, 2, 128), (6, 2, 64), (4, 4, 80)])
def test_prompts(backend, heads, prefix, dtype):
    expected, calls = backend
    for tokens, sequences, page_size in ((17, 1, None), (63, 3, 16), (130, 2, None), (64, 1, None)):
        check(*make_inputs(heads, [tokens] * sequences, dtype, prefix, page_size=page_size))
    assert calls == [expected] * 4


def test_long_prompts_take_cudnn_by_themselves(monkeypatch):
    if not module._cudnn_is_there(0):
        pytest.skip("needs cuDNN and a Hopper GPU")
    seen = []
    attend = module._attend_cudnn
    monkeypatch.setattr(module, "_attend_cudnn", lambda *a: seen.append(1) or attend(*a))
    for counts, starts in (([2048], [0]), ([100, 100], [0, 0]), ([2048], [3]), ([20, 2048], None)):
        check(*make_inputs((4, 2, 128), counts, torch.float16, 1, starts))
    assert len(seen) == 2


def test_later_segments(backend):
    """Rows are in the cache already: only FlashAttention aligns its mask to the lower right."""
    _, calls = backend
    for counts, starts in (([40], [50]), ([33] * 3, [7] * 3)):
        check(*make_inputs((8, 2, 128), counts, torch.float16, 1, starts))
    assert calls == ["_attend_equal"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("heads", [(8, 2, 128), (6, 2, 64)])
def test_different_lengths(monkeypatch, heads, prefix, page_size, dtype):
    calls = []
    attend = module._attend_ragged
    monkeypatch.setattr(module, "_attend_ragged", lambda *a: calls.append(1) or attend(*a))
    counts, starts = [33, 1, 70, 16, 130], [20, 0, 0, 3, 9]
    check(*make_inputs(heads, counts, dtype, prefix, starts, page_size))
    inputs, pages = make_inputs(heads, [5, 0, 40, 41], dtype, prefix, None, page_size)
    check(inputs, pages)
    assert len(calls) == 2
    device, scale = on_gpu(inputs), torch.tensor(0.07)
    plain = ops.kv_prefill_attention(**device).cpu()
    out = ops.kv_prefill_attention(**device, output_scale=scale.cuda())
    assert_bits_equal(out.cpu(), reference.quantize_static(plain, scale, 8))


@pytest.mark.parametrize("output_bits", [4, 8])
@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize("prefix", [0, 3])
def test_quantized_output(backend, prefix, tokens, output_bits):
    for sequences in (1, 3):
        inputs, _ = make_inputs((8, 2, 128), [tokens] * sequences, torch.float16, prefix)
        device, scale = on_gpu(inputs), torch.tensor(0.07)
        plain = ops.kv_prefill_attention(**device).cpu()
        out = ops.kv_prefill_attention(**device, output_scale=scale.cuda(), output_bits=output_bits)
        assert_bits_equal(out.cpu(), reference.quantize_static(plain, scale, output_bits))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sequence", {"sequence": 2}),
        ("sequence", {"sequence": -1}),
        ("start", {"start": [0, -1]}),
        ("start", {"start": [0, 90]}),
        ("counts", {"counts": [20, 21]}),
    ],
)
def test_wrong_argument_is_named(name, changes):
    inputs, _ = make_inputs((8, 2, 128), [20, 20], torch.float16, 1)
    with pytest.raises(ValueError, match=f"kv_prefill_attention: {name}: expected"):
        ops.kv_prefill_attention(**{**on_gpu(inputs), **changes})
