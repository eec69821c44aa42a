# SPDX-License-Identifier: Apache-2.0
"""quantize_dynamic against the reference, bit for bit."""

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant.ops import quantize_digits, quantize_dynamic


def check(x, bits, clip=1.0):
    q, scale = quantize_dynamic(x, bits, clip)
    expected_q, expected_scale = reference.quantize_dynamic(x, bits, clip)
    assert_bits_equal(scale, expected_scale, "scale")
    assert_bits_equal(q, expected_q, "q")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_bits(isa, dtype, bits):
    for clip in (1.0, 0.7, 1.3):
        check(outlier_rows(17, 576, dtype), bits, clip)


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shapes(isa, rows, columns):
    for dtype in FLOAT_DTYPES:
        check(outlier_rows(rows, columns, dtype), 4)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided(isa, dtype):
    x = outlier_rows(17, 137, dtype)
    for view in (strided(x), x.T, x[::2], x[:, ::3], x[3], x.view(17, 1, 137), strided(x)[None]):
        check(view, 8)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_not_a_number_and_infinity_stay_in_their_rows(isa, dtype):
    x = poisoned(17, 64, dtype)
    check(x, 8)
    finite = x.isfinite().all(-1)
    assert finite.any()
    assert not finite.all()
    q, scale = quantize_dynamic(x, 8)
    assert_bits_equal(q[finite], quantize_dynamic(x[finite], 8)[0])
    assert (q[~finite] == 0).all()
    assert not scale[~finite].isfinite().any()


@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-40, 1e-30, 1e38])
def test_extreme_magnitudes(isa, factor):
    x = (torch.rand(5, 64) - 0.5) * factor
    x[2] = 0.0
    check(x, 8)
    assert quantize_dynamic(x, 8)[1][2] == 1.0


def test_the_largest_value_takes_the_largest_level():
    x = torch.randn(137, 576)
    q, scale = quantize_dynamic(x, 8)
    assert (q.abs().amax(-1) == 127).all()
    assert ((q * scale[:, None] - x).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_opcheck(dtype):
    args = (torch.randn(3, 16, dtype=dtype), 4)
    torch.library.opcheck(torch.ops.prefixquant.quantize_dynamic.default, args)


# ---- quantize_digits ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_digits_hold_fifteen_bits(isa, dtype):
    for rows in (0, 1, 17):
        x = outlier_rows(rows, 576, dtype)
        x[:1] = 0
        q, scale = quantize_digits(x)
        high, low = (q.double() * scale[:, None]).chunk(2)
        largest = x.double().abs().amax(dim=-1, keepdim=True)
        assert ((x - high - low).abs() <= largest / 64516 * 1.001).all()
        assert_bits_equal(q[:rows], quantize_dynamic(x, 8)[0])
        assert ((x - high).abs() > largest / 2000).any() or rows < 2  # one digit does not


def test_digits_of_a_strided_matrix():
    x = strided(outlier_rows(5, 64, torch.float32))
    for found, expected in zip(quantize_digits(x), quantize_digits(x.contiguous()), strict=True):
        assert_bits_equal(found, expected)


def test_digits_want_a_matrix():
    with pytest.raises(ValueError, match="quantize_digits: x: expected 2 dimensions"):
        quantize_digits(torch.zeros(3))


def test_digits_opcheck():
    args = (torch.randn(3, 16),)
    torch.library.opcheck(torch.ops.prefixquant.quantize_digits.default, args)
