# SPDX-License-Identifier: Apache-2.0
"""kv_quantize, kv_append and kv_dequantize against the reference, bit for bit."""

import pytest
import reference
import torch
from cases import FLOAT_DTYPES, KV_SHAPES, poisoned
from compare import assert_bits_equal
from prefixquant.errors import UnsupportedModelError
from prefixquant.hadamard import hadamard_signs, split_size
from prefixquant.ops import kv_append, kv_dequantize, kv_quantize


def plans(dim):
    """(signs, block_size) without and, where there is one, with a Hadamard over the head."""
    yield None, 1
    try:
        k = split_size(dim)[1]
    except UnsupportedModelError:
        return
    yield (hadamard_signs(k) if k > 1 else None), dim


def scales(heads):
    return torch.rand(heads) + 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", KV_SHAPES)
def test_quantize(isa, shape, bits):
    scale = scales(shape[1])
    for dtype in FLOAT_DTYPES:
        x = torch.randn(shape).mul(3).to(dtype)
        for signs, block in plans(shape[-1]):
            for shift in (None, torch.randn(shape[1], shape[3])):
                expected = reference.kv_quantize(x, scale, bits, signs, block, shift)
                assert_bits_equal(kv_quantize(x, scale, bits, signs, block, shift), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_strided(isa, bits):
    """The layout of a projection, [B, T, H, D] seen as [B, H, T, D], and worse."""
    base = torch.randn(2, 17, 3, 128)
    scale = scales(3)
    for x in (
        base.transpose(1, 2),
        base.transpose(1, 2)[..., :64],
        base.transpose(1, 2)[:, :, ::2],
    ):
        for signs, block in plans(x.shape[-1]):
            expected = reference.kv_quantize(x, scale, bits, signs, block)
            assert_bits_equal(kv_quantize(x, scale, bits, signs, block), expected)
    x = base.permute(0, 2, 3, 1)[..., :16]
    assert_bits_equal(kv_quantize(x, scale, bits), reference.kv_quantize(x, scale, bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_not_a_number_stays_in_its_row(isa, dtype, bits):
    x = poisoned(2 * 3 * 9, 64, dtype).view(2, 3, 9, 64)
    scale = scales(3)
    for signs, block in plans(64):
        expected = reference.kv_quantize(x, scale, bits, signs, block)
        assert_bits_equal(kv_quantize(x, scale, bits, signs, block), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "position"), [(1, 0), (1, 19), (7, 5), (20, 0), (0, 20)])
def test_append_writes_its_rows_and_no_other(isa, bits, tokens, position):
    x = torch.randn(2, tokens, 3, 64).transpose(1, 2)
    scale = scales(3)
    dim = 32 if bits == 4 else 64
    dtype = torch.uint8 if bits == 4 else torch.int8
    cache = torch.randint(0, 100, (2, 3, 20, dim)).to(dtype)
    expected = cache.clone()
    for signs, block in plans(64):
        for shift in (None, torch.randn(3, 64)):
            rows = reference.kv_quantize(x, scale, bits, signs, block, shift)
            expected[:, :, position : position + tokens] = rows
            kv_append(x, scale, bits, signs, block, cache, position, shift)
            assert_bits_equal(cache, expected)


def test_append_into_a_strided_cache(isa):
    """A cache stored as [B, S, H, D/2]."""
    x, scale = torch.randn(2, 3, 7, 64), scales(3)
    storage = torch.zeros(2, 20, 3, 32, dtype=torch.uint8)
    kv_append(x, scale, 4, None, 1, storage.transpose(1, 2), 4)
    expected = torch.zeros(2, 3, 20, 32, dtype=torch.uint8)
    expected[:, :, 4:11] = reference.kv_quantize(x, scale, 4)
    assert_bits_equal(storage.transpose(1, 2).contiguous(), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", KV_SHAPES)
def test_dequantize(isa, shape, dtype):
    scale = scales(shape[1])
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    wide = torch.randint(-128, 128, shape, dtype=torch.int8)
    for q, bits in (
        (packed, 4),
        (wide, 8),
        (packed.transpose(0, 2).contiguous().transpose(0, 2), 4),
    ):
        expected = reference.kv_dequantize(q, scale, bits, dtype)
        assert_bits_equal(kv_dequantize(q, scale, bits, dtype), expected)


def test_every_int8_to_every_dtype(isa):
    q = torch.arange(-128, 128, dtype=torch.int8).view(1, 1, 4, 64)
    for value in (1e-7, 0.013, 3.0, 1e4, 3e38):
        scale = torch.tensor([value])
        for dtype in FLOAT_DTYPES:
            expected = reference.kv_dequantize(q, scale, 8, dtype)
            assert_bits_equal(kv_dequantize(q, scale, 8, dtype), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits):
    ops, scale = torch.ops.prefixquant, torch.tensor([0.1, 0.2])
    x = torch.randn(1, 2, 3, 24)
    signs = hadamard_signs(12)
    torch.library.opcheck(ops.kv_quantize.default, (x, scale, bits, signs, 24))
    q = kv_quantize(x, scale, bits)
    torch.library.opcheck(ops.kv_dequantize.default, (q, scale, bits, torch.float16))
    cache = torch.zeros(1, 2, 9, q.shape[-1], dtype=q.dtype)
    torch.library.opcheck(ops.kv_append.default, (x, scale, bits, signs, 24, cache, 2))
