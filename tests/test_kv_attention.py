# SPDX-License-Identifier: Apache-2.0
"""kv_attention against float64 attention on the dequantized cache."""

import pytest
import reference
import torch
from cases import ATTENTION_SHAPES, FLOAT_DTYPES, HEAD_DIMS
from compare import assert_bits_equal, assert_float_error
from prefixquant import ops
from torch import Tensor


def make_inputs(
    shape: tuple[int, ...],
    dim: int,
    bits: int,
    prefix: int,
    dtype: torch.dtype,
    prefix_dtype: torch.dtype | None = None,
    poison: int = 37,
) -> dict[str, Tensor]:
    """Every argument but mask and scaling. k and v are views into buffers of S + poison tokens
    whose unused bytes are large values; used values are about 1, so errors are relative."""
    batch, query_heads, kv_heads, tokens, cached = shape
    row = dim * bits // 8
    buffer = torch.full((2, batch, kv_heads, cached + poison, row), 0x77, dtype=torch.uint8)
    buffer[:, :, :, :cached] = torch.randint(0, 256, (2, batch, kv_heads, cached, row)).byte()
    if bits == 8:
        buffer = buffer.view(torch.int8)
    levels = 2 ** (bits - 1)
    return {
        "q": torch.randn(batch, query_heads, tokens, dim).to(dtype),
        "k": buffer[0, :, :, :cached],
        "v": buffer[1, :, :, :cached],
        "k_scale": (torch.rand(kv_heads) + 0.5) / levels,
        "v_scale": (torch.rand(kv_heads) + 0.5) / levels,
        "prefix_k": torch.randn(kv_heads, prefix, dim).to(prefix_dtype or dtype),
        "prefix_v": torch.randn(kv_heads, prefix, dim).to(prefix_dtype or dtype),
    }


def check(inputs: dict[str, Tensor], mask: Tensor | None, scaling: float) -> Tensor:
    out = ops.kv_attention(**inputs, mask=mask, scaling=scaling)
    exact = reference.kv_attention(**inputs, mask=mask, scaling=scaling)
    own = reference.kv_attention(**inputs, mask=mask, scaling=scaling, dtype=inputs["q"].dtype)
    assert out.dtype == inputs["q"].dtype
    assert out.shape == exact.shape
    assert out.isfinite().all()
    assert_float_error(out, own, exact, atol=1e-6)
    return out


def random_mask(shape: tuple[int, ...]) -> Tensor:
    batch, _, _, tokens, cached = shape
    mask = torch.rand(batch, 1, tokens, cached) < 0.7
    mask[0, :, :, : cached // 2] = False  # left padding of the first sequence
    return mask


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_against_float64(isa, shape, dim, bits):
    for dtype, prefix in ((torch.float32, 1), (torch.bfloat16, 5), (torch.float16, 0)):
        inputs = make_inputs(shape, dim, bits, prefix, dtype)
        for mask in (None, random_mask(shape)):
            check(inputs, mask, dim**-0.5)


@pytest.mark.parametrize("prefix", [0, 1, 31, 33, 70])
def test_prefix_lengths(isa, prefix):
    check(make_inputs((2, 6, 2, 3, 50), 64, 4, prefix, torch.float32), None, 0.125)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("prefix_dtype", FLOAT_DTYPES)
def test_prefix_dtype_is_independent(isa, dtype, prefix_dtype):
    check(make_inputs((1, 4, 2, 1, 40), 64, 4, 3, dtype, prefix_dtype), None, 0.125)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows(isa, bits):
    """A prefill: several row tasks a head, causal and masked."""
    shape = (1, 6, 2, 130, 150)
    inputs = make_inputs(shape, 64, bits, 1, torch.float32)
    check(inputs, None, 0.125)
    check(inputs, random_mask(shape), 0.125)


def test_peaked_softmax(isa):
    """Logits of thousands: the running maximum moves, and exp must neither overflow nor vanish."""
    inputs = make_inputs((1, 4, 2, 2, 200), 64, 8, 1, torch.float32)
    check(inputs, None, 300.0)
    inputs["k"].copy_(inputs["k"].sort(dim=2).values)  # the maximum grows with every block
    check(inputs, None, 30.0)


def test_mask_is_shared_and_strided(isa):
    shape = (3, 4, 2, 5, 40)
    inputs = make_inputs(shape, 64, 4, 1, torch.float32)
    mask = torch.rand(1, 1, 5, 40) < 0.5
    expected = check(inputs, mask.expand(3, 1, 5, 40).contiguous(), 0.125)
    for view in (mask, mask.expand(3, 1, 5, 40), mask.mT.contiguous().mT):
        assert_bits_equal(ops.kv_attention(**inputs, mask=view, scaling=0.125), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_attend_nothing_are_zero(isa, bits):
    inputs = make_inputs((2, 4, 2, 3, 70), 64, bits, 0, torch.float32)
    mask = torch.rand(2, 1, 3, 70) < 0.5
    mask[0, :, 1] = False
    out = check(inputs, mask, 0.125)
    assert (out[0, 1] == 0).all()
    assert (out[0, 0] != 0).any()
    out = check(inputs, torch.zeros_like(mask), 0.125)
    assert (out == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_unused_slots_do_not_matter(isa, bits):
    inputs = make_inputs((2, 4, 2, 1, 45), 64, bits, 1, torch.float32)
    tight = {name: t.contiguous() for name, t in inputs.items()}
    expected = ops.kv_attention(**tight, mask=None, scaling=0.125)
    assert not inputs["k"].is_contiguous()
    assert_bits_equal(ops.kv_attention(**inputs, mask=None, scaling=0.125), expected)


def test_queries_as_projected(isa):
    """q as a transposed view of [B, T, Hq, D], and with a strided last dimension."""
    inputs = make_inputs((2, 4, 2, 5, 45), 64, 4, 1, torch.float32)
    expected = ops.kv_attention(**inputs, mask=None, scaling=0.125)
    transposed = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.stack((inputs["q"], inputs["q"]), dim=-1)[..., 0]
    for q in (transposed, spread):
        out = ops.kv_attention(**{**inputs, "q": q}, mask=None, scaling=0.125)
        assert_bits_equal(out, expected)


def test_empty(isa):
    for shape in ((0, 4, 2, 3, 5), (2, 4, 2, 0, 5)):
        inputs = make_inputs(shape, 64, 4, 1, torch.float32)
        batch, heads, _, tokens, _ = shape
        out = ops.kv_attention(**inputs, mask=None, scaling=0.125)
        assert out.shape == (batch, tokens, heads, 64)


def test_thread_count_does_not_change_the_result():
    inputs = make_inputs((2, 6, 2, 40, 300), 64, 4, 1, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.kv_attention(**inputs, mask=None, scaling=0.125))
    finally:
        torch.set_num_threads(before)
    assert_bits_equal(results[1], results[0])
    assert_bits_equal(results[2], results[0])


WRONG = [
    ("q", torch.zeros(1, 4, 2, 64, dtype=torch.int8)),
    ("q", torch.zeros(4, 2, 64)),
    ("q", torch.zeros(1, 4, 2, 63)),
    ("q", torch.zeros(1, 3, 2, 64)),
    ("k", torch.zeros(1, 2, 9, 32, dtype=torch.int32)),
    ("k", torch.zeros(2, 2, 9, 32, dtype=torch.uint8)),
    ("k", torch.zeros(1, 2, 9, 33, dtype=torch.uint8)),
    ("k", torch.zeros(1, 2, 9, 32, dtype=torch.int8)),
    ("k", torch.zeros(2, 9, 32, dtype=torch.uint8)),
    ("k", torch.zeros(1, 2, 9, 64, dtype=torch.uint8)[..., ::2]),
    ("v", torch.zeros(1, 2, 9, 32, dtype=torch.int8)),
    ("v", torch.zeros(1, 2, 8, 32, dtype=torch.uint8)),
    ("v", torch.zeros(1, 2, 9, 64, dtype=torch.uint8)[..., ::2]),
    ("k_scale", torch.ones(2, dtype=torch.bfloat16)),
    ("k_scale", torch.ones(3)),
    ("k_scale", torch.tensor(1.0)),
    ("v_scale", torch.ones(4)),
    ("v_scale", torch.ones(4)[::2]),
    ("prefix_k", torch.zeros(2, 1, 64, dtype=torch.int8)),
    ("prefix_k", torch.zeros(4, 1, 64)),
    ("prefix_k", torch.zeros(2, 1, 32)),
    ("prefix_k", torch.zeros(1, 2, 1, 64)),
    ("prefix_k", torch.zeros(2, 2, 64)[:, ::2]),
    ("prefix_v", torch.zeros(2, 2, 64)),
    ("prefix_v", torch.zeros(2, 1, 64, dtype=torch.float16)),
    ("mask", torch.zeros(1, 1, 2, 9)),
    ("mask", torch.zeros(1, 1, 2, 8, dtype=torch.bool)),
    ("mask", torch.zeros(1, 4, 2, 9, dtype=torch.bool)),
    ("mask", torch.zeros(2, 1, 2, 9, dtype=torch.bool)),
    ("mask", torch.zeros(2, 9, dtype=torch.bool)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_argument_is_named(name, value):
    good = make_inputs((1, 4, 2, 2, 9), 64, 4, 1, torch.float32)
    good["mask"] = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    ops.kv_attention(**good, scaling=0.125)
    # A wrong number of query heads is told from the side of k, which must divide it.
    named = "k" if name == "q" and value.shape[1:2] == (3,) else name
    with pytest.raises(ValueError, match=rf"kv_attention: {named}: expected"):
        ops.kv_attention(**{**good, name: value}, scaling=0.125)


def test_opcheck():
    for bits, mask in ((4, None), (8, torch.ones(1, 1, 2, 9, dtype=torch.bool))):
        inputs = make_inputs((1, 4, 2, 2, 9), 64, bits, 1, torch.float32)
        torch.library.opcheck(
            torch.ops.prefixquant.kv_attention.default, (*inputs.values(), mask, 0.125)
        )


def test_compile():
    inputs = make_inputs((1, 4, 2, 1, 9), 64, 4, 1, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q):
        return ops.kv_attention(**{**inputs, "q": q}, mask=None, scaling=0.125) + 1

    expected = ops.kv_attention(**inputs, mask=None, scaling=0.125) + 1
    assert_bits_equal(attend(inputs["q"]), expected)
