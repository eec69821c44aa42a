# SPDX-License-Identifier: Apache-2.0
"""hadamard, hadamard_quantize and swiglu_hadamard_quantize against the reference, bit for bit."""

import math
from fractions import Fraction

import pytest
import reference
import torch
from cases import (
    FLOAT_DTYPES,
    HADAMARD_SIZES,
    INTEGER_SIZES,
    ROW_COUNTS,
    SIGN_SIZES,
    edge_blocks,
    outlier_rows,
    poisoned,
    strided,
)
from compare import assert_bits_equal, assert_float_error
from prefixquant.hadamard import hadamard_matrix, hadamard_signs, split_size
from prefixquant.ops import (
    hadamard,
    hadamard_quantize,
    swiglu_hadamard_quantize,
    swiglu_hadamard_quantize_dynamic,
)

SCALE = torch.tensor(0.23)


def signs_of(size):
    k = split_size(size)[1]
    return hadamard_signs(k) if k > 1 else None


@pytest.mark.parametrize("size", HADAMARD_SIZES)
def test_sizes(isa, size):
    signs = signs_of(size)
    blocks = 1 if size > 2000 else 3
    for dtype in FLOAT_DTYPES:
        x = outlier_rows(3, blocks * size, dtype)
        assert_bits_equal(hadamard(x, signs, size), reference.hadamard(x, signs, size))
        q = hadamard_quantize(x, signs, size, SCALE, 4)
        assert_bits_equal(q, reference.hadamard_quantize(x, signs, size, SCALE, 4))
        gate, up = torch.cat((torch.randn(3, blocks * size).to(dtype), x), -1).chunk(2, -1)
        q = swiglu_hadamard_quantize(gate, up, signs, size, SCALE, 8)
        expected = reference.swiglu_hadamard_quantize(gate, up, signs, size, SCALE, 8)
        assert_bits_equal(q, expected)
        check_dynamic(gate, up, signs, size)


def check_dynamic(gate, up, signs, size):
    q, scale = swiglu_hadamard_quantize_dynamic(gate, up, signs, size, 4)
    expected = reference.swiglu_hadamard_quantize_dynamic(gate, up, signs, size, 4)
    assert_bits_equal(scale, expected[1], "dynamic scale")
    assert_bits_equal(q, expected[0], "dynamic q")


@pytest.mark.parametrize("k", SIGN_SIZES)
@pytest.mark.parametrize("pow2", [1, 2, 4, 8, 16, 64])
def test_sign_matrices(isa, k, pow2):
    signs = hadamard_signs(k)
    x = torch.randn(2, 2 * k * pow2)
    expected = reference.hadamard(x, signs, k * pow2)
    assert_bits_equal(hadamard(x, signs, k * pow2), expected)


@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_rows(isa, rows):
    signs = signs_of(96)
    for dtype in FLOAT_DTYPES:
        x = outlier_rows(rows, 192, dtype)
        assert_bits_equal(hadamard(x, signs, 96), reference.hadamard(x, signs, 96))
        check_dynamic(x, x.flip(0), signs, 96)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided(isa, dtype, size):
    x = outlier_rows(2 * size, 2 * size, dtype)
    signs = signs_of(size)
    views = (strided(x), x.T, x[::3], x[0], x.view(2, size, 2 * size).transpose(0, 1))
    for view in views:
        assert_bits_equal(hadamard(view, signs, size), reference.hadamard(view, signs, size))
        q = hadamard_quantize(view, signs, size, SCALE, 8)
        assert_bits_equal(q, reference.hadamard_quantize(view, signs, size, SCALE, 8))
        other = view.flip(0)
        q = swiglu_hadamard_quantize(view, other, signs, size, SCALE, 8)
        expected = reference.swiglu_hadamard_quantize(view, other, signs, size, SCALE, 8)
        assert_bits_equal(q, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", [1, 64, 96])
def test_not_a_number_stays_in_its_block(isa, dtype, size):
    x = poisoned(17, 192, dtype)
    signs = signs_of(size)
    assert_bits_equal(hadamard(x, signs, size), reference.hadamard(x, signs, size))
    q = hadamard_quantize(x, signs, size, SCALE, 4)
    assert_bits_equal(q, reference.hadamard_quantize(x, signs, size, SCALE, 4))
    q = swiglu_hadamard_quantize(x, x.flip(0), signs, size, SCALE, 4)
    expected = reference.swiglu_hadamard_quantize(x, x.flip(0), signs, size, SCALE, 4)
    assert_bits_equal(q, expected)
    check_dynamic(x, x.flip(0), signs, size)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("size", INTEGER_SIZES)
def test_sums_of_integers_at_the_edges(isa, dtype, size):
    """60 < k < 512: a block is scaled by its largest magnitude, all of it NaN where that is not."""
    signs = signs_of(size)
    x = edge_blocks(size, dtype)
    y = hadamard(x, signs, size)
    assert_bits_equal(y, reference.hadamard(x, signs, size))
    assert y[0].isnan().all()
    assert y[1].isnan().all()
    assert (y[2] == 0).all()
    q = hadamard_quantize(x, signs, size, SCALE, 8)
    assert_bits_equal(q, reference.hadamard_quantize(x, signs, size, SCALE, 8))
    assert not q[:3].any()
    check_dynamic(x, x.flip(0), signs, size)


def test_sums_of_integers_by_their_definition():
    """One block in Python's own integers and fractions."""
    size, k = 152, 76
    signs = signs_of(size)
    x = outlier_rows(1, size, torch.float32)[0]
    x[3] *= 1000
    even, odd = x[::2], x[1::2]
    values = torch.stack((even + odd, even - odd), 1)
    exponent = math.frexp(values.abs().max().item())[1]
    integers = [[round(Fraction(v) * 2 ** (22 - exponent)) for v in row] for row in values.tolist()]
    factor = torch.tensor(1 / math.sqrt(size)) * 2.0 ** (exponent - 22)
    rows = signs.tolist()
    sums = [[sum(rows[i][j] * integers[j][c] for j in range(k)) for c in (0, 1)] for i in range(k)]
    expected = (torch.tensor(sums, dtype=torch.int32).float() * factor).flatten()
    assert_bits_equal(hadamard(x, signs, size), expected)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_bits(isa, bits):
    x = outlier_rows(5, 1536, torch.bfloat16, factor=20.0)
    signs = signs_of(1536)
    q = hadamard_quantize(x, signs, 1536, SCALE, bits)
    assert_bits_equal(q, reference.hadamard_quantize(x, signs, 1536, SCALE, bits))


@pytest.mark.parametrize("size", [64, 96, 576, 1536, *INTEGER_SIZES])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_error_against_the_exact_matrix(dtype, size):
    x = outlier_rows(16, size, dtype, factor=20.0)
    matrix = hadamard_matrix(size)
    exact = x.double() @ matrix.T
    assert_float_error(hadamard(x, signs_of(size), size), x @ matrix.to(dtype).T, exact)


def test_silu_of_every_bfloat16(isa):
    """All 65536 inputs: silu against the reference by bits (up = 1, no transform, 8 bits)."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    up = torch.ones_like(gate)
    for value in (1e-3, 0.07, 1.0):
        scale = torch.tensor(value)
        q = swiglu_hadamard_quantize(gate, up, None, 1, scale, 8)
        expected = reference.swiglu_hadamard_quantize(gate, up, None, 1, scale, 8)
        assert_bits_equal(q, expected)


def test_threads_do_not_change_the_result():
    x = outlier_rows(100, 1536, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = hadamard(x, signs_of(1536), 1536)
        torch.set_num_threads(3)
        assert_bits_equal(hadamard(x, signs_of(1536), 1536), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [1, 8, 12])
def test_opcheck(size):
    x, signs = torch.randn(3, 24), signs_of(size)
    ops = torch.ops.prefixquant
    torch.library.opcheck(ops.hadamard.default, (x, signs, size))
    torch.library.opcheck(ops.hadamard_quantize.default, (x, signs, size, SCALE, 4))
    args = (x, x + 1, signs, size, SCALE, 4)
    torch.library.opcheck(ops.swiglu_hadamard_quantize.default, args)
    args = (x, x + 1, signs, size, 4)
    torch.library.opcheck(ops.swiglu_hadamard_quantize_dynamic.default, args)
