# SPDX-License-Identifier: Apache-2.0
"""Attention over a KV cache on the GPU: against float64, ragged, paged, poisoned, captured."""

import pytest
import reference
import test_kv_attention as cpu_attention
import test_kv_cache_attention as cpu_cache
import torch
from cases import ATTENTION_SHAPES
from compare import assert_bits_equal, assert_float_error
from kv_cases import HEADS, filled_cache
from prefixquant import _C, ops
from torch import Tensor

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)

KERNEL_HEADS = ((3, 1, 64), (8, 8, 128), (8, 1, 96), (8, 2, 128), (4, 2, 256), (16, 1, 64))
DTYPES = (torch.bfloat16, torch.float16)


def on_gpu(inputs: dict) -> dict:
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def check_decode(inputs: dict, pages: list[list[int]]) -> Tensor:
    """`inputs` on the CPU; the result is checked, and checked to be the same a second time."""
    device = on_gpu(inputs)
    out = ops.kv_decode_attention(**device)
    exact, own = (
        torch.cat(parts)
        for parts in zip(
            *(
                cpu_cache.expected(inputs, pages, inputs["q"][b : b + 1], b, length)
                for b, length in enumerate(inputs["lengths"].tolist())
            ),
            strict=True,
        )
    )
    assert out.isfinite().all()
    assert_float_error(out.cpu(), own, exact, atol=2e-6)
    assert_bits_equal(ops.kv_decode_attention(**device).cpu(), out.cpu())
    return out


@pytest.mark.parametrize("page_size", [None, 16, 5])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", [*KERNEL_HEADS, *HEADS])
def test_decode(heads, bits, page_size):
    for dtype, prefix in zip((*DTYPES, torch.float32), (1, 4, 0), strict=True):
        inputs = cpu_cache.make_inputs(heads, bits, dtype, prefix=prefix, page_size=page_size)
        check_decode(*inputs)


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("page_size", [None, 64])
def test_one_token_beside_ten_thousand(prefix, page_size):
    lengths = [1, 10000, 0, 17]
    inputs, _ = cpu_cache.make_inputs((8, 2, 128), 4, torch.bfloat16, [1] * 4, prefix)
    k, v, table, pages = filled_cache(lengths, 2, 128, 4, torch.bfloat16, page_size, capacity=10001)
    inputs.update(k_cache=k, v_cache=v, block_table=table, max_length=10000)
    inputs["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    out = check_decode(inputs, pages)
    if prefix == 0:
        assert (out[2] == 0).all()


def test_many_short_sequences():
    """More rows than CTAs: one line of chunks, rows that begin and end anywhere in a CTA."""
    lengths = [i * 37 % 301 for i in range(90)]
    inputs, _ = cpu_cache.make_inputs((8, 4, 64), 4, torch.float16, [1] * 90)
    k, v, _, pages = filled_cache(lengths, 4, 64, 4, torch.float16, capacity=301)
    inputs.update(k_cache=k, v_cache=v, max_length=301)
    inputs["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    check_decode(inputs, pages)


@pytest.mark.parametrize("length", [0, 1, 33, 513, 4100, 9000])
@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (16, 1, 256)])
def test_one_sequence(heads, length):
    """Few rows, which have CTAs of their own: a cluster each or, from some length on, many."""
    inputs, _ = cpu_cache.make_inputs(heads, 4, torch.bfloat16, [1], prefix=3)
    k, v, _, pages = filled_cache([length], heads[1], heads[2], 4, torch.bfloat16, capacity=9001)
    inputs.update(k_cache=k, v_cache=v, max_length=max(length, 1))
    inputs["lengths"] = torch.tensor([length], dtype=torch.int32)
    check_decode(inputs, pages)


@pytest.mark.parametrize("output_bits", [4, 8])
@pytest.mark.parametrize("dim", [64, 80])
def test_quantized_output(output_bits, dim):
    inputs, _ = cpu_cache.make_inputs((6, 2, dim), 4, torch.bfloat16)
    inputs, scale = on_gpu(inputs), torch.tensor(0.07)
    plain = ops.kv_decode_attention(**inputs).cpu()
    out = ops.kv_decode_attention(**inputs, output_scale=scale.cuda(), output_bits=output_bits)
    assert_bits_equal(out.cpu(), reference.quantize_static(plain, scale, output_bits))


def test_graph_follows_the_lengths():
    """One captured launch, replayed while the sequences grow; nothing depends on the host."""
    inputs, pages = cpu_cache.make_inputs((6, 2, 64), 4, torch.bfloat16, page_size=16)
    device = on_gpu(inputs)
    ops.kv_decode_attention(**device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.kv_decode_attention(**device)
    for _ in range(3):
        inputs["lengths"] = torch.tensor([1, 30, 0, 60, 88, 7], dtype=torch.int32)
        device["lengths"].copy_(inputs["lengths"])
        graph.replay()
        assert_bits_equal(out.cpu(), check_decode(inputs, pages).cpu())


def test_side_stream():
    inputs = on_gpu(cpu_cache.make_inputs((6, 2, 64), 4, torch.bfloat16)[0])
    expected = ops.kv_decode_attention(**inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = ops.kv_decode_attention(**inputs)
    stream.synchronize()
    assert_bits_equal(out.cpu(), expected.cpu())


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", [(6, 2, 64), (8, 2, 128), (6, 2, 80)])
def test_prefill(heads, bits, page_size):
    for dtype, prefix in zip((*DTYPES, torch.float32), (1, 4, 0), strict=True):
        inputs, pages = cpu_cache.make_inputs(
            heads, bits, dtype, prefix=prefix, page_size=page_size
        )
        device = on_gpu(inputs)
        for sequence, tokens in ((4, 90), (4, 16), (4, 41), (3, 1), (5, 3), (2, 0)):
            length = cpu_cache.LENGTHS[sequence]
            q = torch.randn(tokens, *inputs["q"].shape[1:]).to(dtype)
            out = cpu_cache.prefill(device, q.cuda(), length - tokens, sequence).cpu()
            exact, own = cpu_cache.expected(inputs, pages, q, sequence, length)
            assert_float_error(out, own, exact, atol=2e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_kv_attention(shape, bits):
    for dtype, prefix, dim in zip((*DTYPES, torch.float32), (5, 0, 1), (64, 128, 80), strict=True):
        inputs = cpu_attention.make_inputs(shape, dim, bits, prefix, dtype)
        for mask in (None, cpu_attention.random_mask(shape)):
            arguments = {"mask": mask, "scaling": dim**-0.5}
            exact = reference.kv_attention(**inputs, **arguments)
            own = reference.kv_attention(**inputs, **arguments, dtype=dtype)
            out = ops.kv_attention(**on_gpu(inputs), **on_gpu(arguments)).cpu()
            assert out.isfinite().all()
            assert_float_error(out, own, exact, atol=2e-6)


WRONG = [
    ("q", torch.zeros(6, 6, 64, dtype=torch.int8)),
    ("q", torch.zeros(6, 5, 64, dtype=torch.bfloat16)),
    ("k_cache", torch.zeros(9, 2, 16, 32, dtype=torch.int8)),
    ("k_cache", torch.zeros(18, 2, 16, 31, dtype=torch.uint8)),
    ("v_cache", torch.zeros(9, 2, 15, 32, dtype=torch.uint8)),
    ("k_scale", None),
    ("v_scale", torch.ones(3)),
    ("prefix_k", torch.zeros(2, 3, 32, dtype=torch.bfloat16)),
    ("prefix_v", torch.zeros(2, 3, 64, dtype=torch.float16)),
    ("lengths", torch.zeros(6, dtype=torch.int64)),
    ("lengths", torch.zeros(5, dtype=torch.int32)),
    ("block_table", torch.zeros(6, 8, dtype=torch.int64)),
    ("block_table", torch.zeros(1, 8, dtype=torch.int32)),
    ("kv_bits", 3),
    ("max_length", 10000),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_argument_is_named(name, value):
    good = on_gpu(cpu_cache.make_inputs((6, 2, 64), 4, torch.bfloat16, page_size=16)[0])
    wrong = on_gpu({**good, name: value})
    named = "k_cache" if name == "q" and value.shape[1] == 5 else name
    with pytest.raises(ValueError, match=rf"kv_decode_attention: {named}: expected"):
        ops.kv_decode_attention(**wrong)


def test_wrong_device():
    good = on_gpu(cpu_cache.make_inputs((6, 2, 64), 4, torch.bfloat16)[0])
    for name in ("k_cache", "v_cache", "k_scale", "prefix_k", "prefix_v", "lengths"):
        with pytest.raises(ValueError, match=rf"{name}: expected a tensor on cuda"):
            ops.kv_decode_attention(**{**good, name: good[name].cpu()})


def test_cpu_tensors_are_refused():
    """The kernel's own check: whoever calls past the dispatcher gets an error, not a crash."""
    empty = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="q: expected a CUDA tensor, got cpu"):
        _C.kv_attention_cuda(
            op="kv_attention",
            q=empty,
            k=empty,
            v=empty,
            k_scale=None,
            v_scale=None,
            prefix_k=empty[0],
            prefix_v=empty[0],
            lengths=None,
            block_table=None,
            mask=None,
            max_length=1,
            scaling=1.0,
            output_scale=None,
            output_bits=8,
            out=empty,
            counters=empty,
            partials=empty,
            stream=0,
        )
    with pytest.raises(ValueError, match="device: expected a CUDA device, got -1"):
        _C.kv_attention_workspace_cuda(batch=1, tokens=1, heads=1, kv_heads=1, dim=64, device=-1)


def test_opcheck():
    for bits in (4, 8):
        inputs = on_gpu(cpu_cache.make_inputs((6, 2, 64), bits, torch.bfloat16, page_size=16)[0])
        arguments = (*inputs.values(), torch.tensor(0.1, device="cuda"), 8)
        torch.library.opcheck(torch.ops.prefixquant.kv_decode_attention.default, arguments)
