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


def make_inputs(heads, tokens, sequences, dtype, prefix, start=0, page_size=None):
    """(arguments of kv_prefill_attention on the CPU, the pages of every sequence)"""
    lengths = [start + tokens] * sequences
    inputs, _ = cpu_cache.make_inputs(heads, 4, dtype, [1] * sequences, prefix)
    inputs = {n: v for n, v in inputs.items() if n not in ("lengths", "max_length")}
    names = ("k_cache", "v_cache", "block_table")
    *cache, pages = filled_cache(
        lengths, *heads[1:], 4, dtype, page_size, capacity=start + tokens + 5
    )
    inputs.update(zip(names, cache, strict=True))
    q = torch.randn(sequences * tokens, heads[0], heads[2]).to(dtype)
    return inputs | {"q": q, "start": start, "sequences": sequences}, pages


def on_gpu(inputs):
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def check(inputs, pages):
    """Against float64 on the CPU; returns the result."""
    out = ops.kv_prefill_attention(**on_gpu(inputs)).cpu()
    sequences = inputs["sequences"]
    length = inputs["start"] + len(inputs["q"]) // sequences
    pairs = [
        cpu_cache.expected(inputs, pages, q, b, length)
        for b, q in enumerate(inputs["q"].chunk(sequences))
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
    for name in ("_attend_cudnn", "_attend_lower_right"):
        function = getattr(module, name)

        def counted(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    return {"cudnn": "_attend_cudnn", "flash": "_attend_lower_right"}[request.param], calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("heads", [(8, 2, 128), (6, 2, 64), (4, 4, 80)])
def test_prompts(backend, heads, prefix, dtype):
    expected, calls = backend
    for tokens, sequences, page_size in ((17, 1, None), (63, 3, 16), (130, 2, None), (64, 1, None)):
        check(*make_inputs(heads, tokens, sequences, dtype, prefix, page_size=page_size))
    assert calls == [expected] * 4


def test_long_prompts_take_cudnn_by_themselves(monkeypatch):
    if not module._cudnn_is_there(0):
        pytest.skip("needs cuDNN and a Hopper GPU")
    seen = []
    attend = module._attend_cudnn
    monkeypatch.setattr(module, "_attend_cudnn", lambda *a: seen.append(1) or attend(*a))
    for tokens, sequences, start in ((2048, 1, 0), (100, 2, 0), (2048, 1, 3)):
        check(*make_inputs((4, 2, 128), tokens, sequences, torch.float16, 1, start))
    assert len(seen) == 1


def test_later_segments(backend):
    """Rows are in the cache already: only FlashAttention aligns its mask to the lower right."""
    _, calls = backend
    for tokens, start, sequences in ((40, 50, 1), (33, 7, 3)):
        check(*make_inputs((8, 2, 128), tokens, sequences, torch.float16, 1, start))
    assert calls == ["_attend_lower_right"] * 2


@pytest.mark.parametrize("output_bits", [4, 8])
@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize("prefix", [0, 3])
def test_quantized_output(backend, prefix, tokens, output_bits):
    for sequences in (1, 3):
        inputs, _ = make_inputs((8, 2, 128), tokens, sequences, torch.float16, prefix)
        device, scale = on_gpu(inputs), torch.tensor(0.07)
        plain = ops.kv_prefill_attention(**device).cpu()
        out = ops.kv_prefill_attention(**device, output_scale=scale.cuda(), output_bits=output_bits)
        assert_bits_equal(out.cpu(), reference.quantize_static(plain, scale, output_bits))


def test_lengths_that_share_a_plan():
    for length in range(1, 9000, 7):
        rows = module._cudnn_rows(length)
        assert length <= rows <= max(length + 63, length * 1.07)
    assert len({module._cudnn_rows(n) for n in range(1, 8193)}) <= 64
