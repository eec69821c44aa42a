# SPDX-License-Identifier: Apache-2.0
"""kv_decode_attention and kv_prefill_attention against float64 attention on the cached rows."""

import pytest
import reference
import torch
from cases import FLOAT_DTYPES
from compare import assert_bits_equal, assert_float_error
from kv_cases import HEADS, cache_scales, filled_cache
from prefixquant import ops
from prefixquant.ops import kv_prefill_attention as kv_prefill_attention_op
from torch import Tensor

LENGTHS = [1, 33, 0, 64, 90, 7]


def make_inputs(
    heads: tuple[int, int, int],
    bits: int,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    prefix: int = 3,
    page_size: int | None = None,
) -> tuple[dict, list[list[int]]]:
    """(the arguments of kv_decode_attention, the pages of every sequence)"""
    query_heads, kv_heads, dim = heads
    lengths = LENGTHS if lengths is None else lengths
    k_cache, v_cache, table, pages = filled_cache(lengths, kv_heads, dim, bits, dtype, page_size)
    return {
        "q": torch.randn(len(lengths), query_heads, dim).to(dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_scale": cache_scales(kv_heads, bits),
        "v_scale": cache_scales(kv_heads, bits),
        "prefix_k": torch.randn(kv_heads, prefix, dim).to(dtype),
        "prefix_v": torch.randn(kv_heads, prefix, dim).to(dtype),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
        "kv_bits": bits,
        "max_length": max(lengths, default=0),
        "scaling": dim**-0.5,
    }, pages


def expected(inputs: dict, pages: list[list[int]], q: Tensor, sequence: int, length: int):
    """(float64, in the dtype of q) attention of q [T, Hq, D], the last tokens of the sequence."""
    rows = [
        reference.cached_rows(cache, scale, inputs["kv_bits"], pages[sequence], length)
        for cache, scale in (
            (inputs["k_cache"], inputs["k_scale"]),
            (inputs["v_cache"], inputs["v_scale"]),
        )
    ]
    rest = (inputs["prefix_k"], inputs["prefix_v"], inputs["scaling"])
    return (
        reference.prefix_attention(q, *rows, *rest),
        reference.prefix_attention(q, *(r.to(q.dtype) for r in rows), *rest),
    )


def check_decode(inputs: dict, pages: list[list[int]]) -> Tensor:
    out = ops.kv_decode_attention(**inputs)
    exact, own = (
        torch.cat(parts)
        for parts in zip(
            *(
                expected(inputs, pages, inputs["q"][b : b + 1], b, length)
                for b, length in enumerate(inputs["lengths"].tolist())
            ),
            strict=True,
        )
    )
    assert out.dtype == inputs["q"].dtype
    assert out.isfinite().all()
    assert_float_error(out, own, exact, atol=1e-6)
    return out


@pytest.mark.parametrize("page_size", [None, 16, 5])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_decode(isa, heads, bits, page_size):
    for dtype, prefix in zip(FLOAT_DTYPES, (1, 5, 0), strict=True):
        check_decode(*make_inputs(heads, bits, dtype, prefix=prefix, page_size=page_size))


def test_sequence_that_attends_nothing_is_zero(isa):
    out = check_decode(*make_inputs((6, 2, 64), 4, prefix=0))
    assert (out[LENGTHS.index(0)] == 0).all()
    assert (out[0] != 0).any()


def test_fewer_sequences_than_pages(isa):
    inputs, pages = make_inputs((6, 2, 64), 4)
    inputs["q"], inputs["lengths"] = inputs["q"][:2], inputs["lengths"][:2]
    check_decode(inputs, pages)


def test_long_and_parallel():
    lengths = [2000, 3, 1777]
    k, v, _, pages = filled_cache(lengths, 3, 64, 4, torch.float32, capacity=2048)
    inputs, _ = make_inputs((9, 3, 64), 4, lengths=[1, 1, 1])
    inputs.update(k_cache=k, v_cache=v, max_length=2048)
    inputs["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    check_decode(inputs, pages)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("output_bits", [4, 8])
def test_quantized_output(isa, dtype, output_bits):
    for heads in ((6, 2, 64), (6, 2, 80)):
        inputs, _ = make_inputs(heads, 4, dtype)
        scale = torch.tensor(0.07)
        plain = ops.kv_decode_attention(**inputs)
        out = ops.kv_decode_attention(**inputs, output_scale=scale, output_bits=output_bits)
        assert_bits_equal(out, reference.quantize_static(plain, scale, output_bits))


def test_decode_equals_kv_attention(isa):
    """The same kernel as the transformers attention: the same bits."""
    inputs, _ = make_inputs((6, 2, 64), 4, lengths=[90, 90])
    names = ("k_scale", "v_scale", "prefix_k", "prefix_v", "scaling")
    same = {name: inputs[name] for name in names}
    out = ops.kv_attention(
        q=inputs["q"][:, :, None], k=inputs["k_cache"], v=inputs["v_cache"], mask=None, **same
    )
    assert_bits_equal(ops.kv_decode_attention(**inputs), out.flatten(1))


def prefill(inputs: dict, q: Tensor, start: int, sequence: int) -> Tensor:
    names = ("k_cache", "v_cache", "k_scale", "v_scale", "prefix_k", "prefix_v", "kv_bits")
    same = {name: inputs[name] for name in (*names, "scaling", "block_table")}
    return ops.kv_prefill_attention(q, start=start, sequence=sequence, **same)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill(isa, monkeypatch, heads, bits, page_size):
    module = kv_prefill_attention_op.__globals__
    monkeypatch.setitem(module, "matmul_dtype", lambda device: torch.float32)
    monkeypatch.setitem(module, "_QUERY_CHUNK", 32)
    for dtype, prefix in zip(FLOAT_DTYPES, (1, 5, 0), strict=True):
        inputs, pages = make_inputs(heads, bits, dtype, prefix=prefix, page_size=page_size)
        for sequence, tokens in ((4, 90), (4, 16), (4, 41), (3, 1), (0, 1), (5, 3), (2, 0)):
            length = LENGTHS[sequence]
            q = torch.randn(tokens, *inputs["q"].shape[1:]).to(dtype)
            out = prefill(inputs, q, length - tokens, sequence)
            exact, own = expected(inputs, pages, q, sequence, length)
            assert out.dtype == dtype
            assert_float_error(out, own, exact, atol=2e-6)


def test_prefill_in_bfloat16():
    inputs, pages = make_inputs((6, 2, 64), 4, lengths=[90])
    q = torch.randn(90, 6, 64)
    exact, _ = expected(inputs, pages, q, 0, 90)
    _, own = expected(inputs, pages, q.bfloat16(), 0, 90)
    assert_float_error(prefill(inputs, q, 0, 0), own, exact, atol=2e-3)


def test_prefill_in_pieces_equals_decode():
    inputs, _ = make_inputs((6, 2, 64), 4, lengths=[90])
    for first in range(0, 90, 16):
        q = torch.randn(min(16, 90 - first), 6, 64)
        whole = prefill(inputs, q, first, 0)
        for t in range(len(q)):
            lengths = torch.tensor([first + t + 1], dtype=torch.int32)
            one = {**inputs, "q": q[t : t + 1], "lengths": lengths}
            assert_bits_equal(whole[t : t + 1], ops.kv_decode_attention(**one))


WRONG = [
    ("q", torch.zeros(6, 6, 64, dtype=torch.int8)),
    ("q", torch.zeros(6, 5, 64)),
    ("q", torch.zeros(6, 6, 128)[..., ::2]),
    ("k_cache", torch.zeros(9, 2, 16, 32, dtype=torch.int8)),
    ("k_cache", torch.zeros(9, 2, 16, 31, dtype=torch.uint8)),
    ("v_cache", torch.zeros(9, 2, 15, 32, dtype=torch.uint8)),
    ("k_scale", None),
    ("v_scale", torch.ones(3)),
    ("prefix_k", torch.zeros(2, 3, 32)),
    ("prefix_k", torch.zeros(1, 3, 64)),
    ("prefix_v", torch.zeros(2, 3, 64, dtype=torch.float16)),
    ("prefix_v", torch.zeros(2, 4, 64)),
    ("block_table", torch.zeros(6, 8, dtype=torch.int64)),
    ("block_table", torch.full((6, 8), 1000, dtype=torch.int32)),
    ("block_table", torch.full((6, 8), -1, dtype=torch.int32)),
    ("block_table", torch.zeros(1, 8, dtype=torch.int32)),
    ("kv_bits", 3),
]
WRONG_DECODE = [
    *WRONG,
    ("lengths", torch.zeros(6, dtype=torch.int64)),
    ("lengths", torch.zeros(5, dtype=torch.int32)),
    ("lengths", torch.full((6,), 91, dtype=torch.int32)),
    ("lengths", torch.full((6,), -1, dtype=torch.int32)),
    ("max_length", 10000),
]


@pytest.mark.parametrize(("name", "value"), WRONG_DECODE)
def test_wrong_argument_is_named(name, value):
    good, _ = make_inputs((6, 2, 64), 4, page_size=16)
    ops.kv_decode_attention(**good)
    with pytest.raises(ValueError, match=rf"kv_decode_attention: {name}: expected"):
        ops.kv_decode_attention(**{**good, name: value})


def test_wrong_output_scale():
    good, _ = make_inputs((6, 2, 64), 4)
    with pytest.raises(ValueError, match="kv_decode_attention: output: scale: expected"):
        ops.kv_decode_attention(**good, output_scale=torch.ones(1))
    with pytest.raises(ValueError, match="kv_decode_attention: output: bits: expected"):
        ops.kv_decode_attention(**good, output_scale=torch.ones(()), output_bits=9)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    ("name", "value"), [*WRONG, ("start", 300), ("start", -1), ("sequence", 6)]
)
def test_wrong_prefill_argument_is_named(name, value, tokens):
    good, _ = make_inputs((6, 2, 64), 4, page_size=16)
    good = {n: t for n, t in good.items() if n not in ("lengths", "max_length")}
    good.update(q=torch.randn(tokens, 6, 64), start=0, sequence=4)
    ops.kv_prefill_attention(**good)
    wrong = {**good, name: value}
    if name == "start":
        wrong["q"] = torch.randn(40, 6, 64)
    named = "block_table" if name == "sequence" else name
    with pytest.raises(ValueError, match=rf"kv_prefill_attention: {named}: expected"):
        ops.kv_prefill_attention(**wrong)


def test_opcheck():
    for bits in (4, 8, 16):
        inputs, _ = make_inputs((6, 2, 64), bits, page_size=16)
        arguments = (*inputs.values(), torch.tensor(0.1), 8)
        torch.library.opcheck(torch.ops.prefixquant.kv_decode_attention.default, arguments)
        names = ("k_cache", "v_cache", "k_scale", "v_scale", "prefix_k", "prefix_v", "kv_bits")
        same = [inputs[name] for name in names]
        for tokens in (4, 40):
            arguments = (torch.randn(tokens, 6, 64), *same, [90 - tokens], [tokens], 0.1, 4)
            torch.library.opcheck(
                torch.ops.prefixquant.kv_prefill_attention.default,
                (*arguments, inputs["block_table"], None, 8),
            )
