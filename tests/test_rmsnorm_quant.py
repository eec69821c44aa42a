# SPDX-License-Identifier: Apache-2.0
"""rmsnorm and its fusions against the reference, bit for bit.

The kernel and the reference sum the squares in float64 in different orders. That moves rstd by at
most a float32 ulp, in about one row of 10^8, and a level only at a tie: with the fixed seeds here
it does not occur.
"""

from itertools import product

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant.ops import (
    add_rmsnorm_quantize,
    rmsnorm,
    rmsnorm_quantize,
    rmsnorm_quantize_dynamic,
)

EPS = 1e-5


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shapes(isa, rows, columns):
    scale = torch.tensor(0.17)
    for dtype in FLOAT_DTYPES:
        x = outlier_rows(rows, columns, dtype)
        for weight in (None, torch.randn(columns).to(dtype), torch.rand(columns)):
            expected = reference.rmsnorm_quantize(x, weight, EPS, scale, 4)
            assert_bits_equal(rmsnorm_quantize(x, weight, EPS, scale, 4), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_and_strides(isa, dtype, bits):
    scale = torch.tensor(3.0 / 2 ** (bits - 1))
    x = outlier_rows(17, 576, dtype)
    for view in (x, strided(x), x.T, x[::3], x[5], x.view(17, 1, 576)):
        expected = reference.rmsnorm_quantize(view, None, EPS, scale, bits)
        assert_bits_equal(rmsnorm_quantize(view, None, EPS, scale, bits), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_not_a_number_stays_in_its_row(isa, dtype):
    x = poisoned(17, 64, dtype)
    scale = torch.tensor(0.1)
    q = rmsnorm_quantize(x, None, EPS, scale, 8)
    assert_bits_equal(q, reference.rmsnorm_quantize(x, None, EPS, scale, 8))
    finite = x.isfinite().all(-1)
    assert finite.any()
    assert not finite.all()
    assert_bits_equal(q[finite], reference.rmsnorm_quantize(x[finite], None, EPS, scale, 8))


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-20, 1e18])
def test_extreme_magnitudes(isa, factor):
    """Squares that leave the range of float32 are summed in float64."""
    x = torch.randn(3, 576) * factor
    for eps in (0.0, EPS):
        expected = reference.rmsnorm_quantize(x, None, eps, torch.tensor(0.02), 8)
        assert_bits_equal(rmsnorm_quantize(x, None, eps, torch.tensor(0.02), 8), expected)


def test_agrees_with_torch_rms_norm():
    x, weight = torch.randn(8, 576, dtype=torch.float64), torch.rand(576, dtype=torch.float64)
    exact = torch.nn.functional.rms_norm(x, (576,), weight, EPS)
    q = rmsnorm_quantize(x.float(), weight.float(), EPS, torch.tensor(0.05), 8)
    assert (q * 0.05 - exact.clamp(-128 * 0.05, 127 * 0.05)).abs().max() < 0.025 * 1.0001


def check_forms(x, weight, bits):
    """rmsnorm, rmsnorm_quantize_dynamic, add_rmsnorm_quantize and the packed forms."""
    assert_bits_equal(rmsnorm(x, weight, EPS), reference.rmsnorm(x, weight, EPS), "rmsnorm")
    q, scale = rmsnorm_quantize_dynamic(x, weight, EPS, bits)
    expected_q, expected_scale = reference.rmsnorm_quantize_dynamic(x, weight, EPS, bits)
    assert_bits_equal(scale, expected_scale, "dynamic scale")
    assert_bits_equal(q, expected_q, "dynamic q")
    scale = torch.tensor(3.0 / 2 ** (bits - 1))
    residual = strided(torch.randn(x.shape).to(x.dtype))
    total = reference.add(residual, x)
    for packed in (False, True) if x.shape[-1] % 2 == 0 and bits <= 4 else (False,):
        expected = reference.rmsnorm_quantize(x, weight, EPS, scale, bits, packed)
        assert_bits_equal(rmsnorm_quantize(x, weight, EPS, scale, bits, packed), expected)
        copy = strided(residual)
        q = add_rmsnorm_quantize(copy, x, weight, EPS, scale, bits, packed)
        assert_bits_equal(copy, total, "residual")
        expected = reference.rmsnorm_quantize(total, weight, EPS, scale, bits, packed)
        assert_bits_equal(q, expected, "add_rmsnorm_quantize")


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_forms(isa, rows, columns):
    for dtype in FLOAT_DTYPES:
        x = outlier_rows(rows, columns, dtype)
        check_forms(x, None, 4)
        check_forms(x, torch.rand(columns).to(dtype), 8)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_forms_strided_and_poisoned(isa, dtype):
    x = outlier_rows(18, 576, dtype)
    for view in (strided(x), x[::3], x[5], x.view(18, 1, 576)):
        check_forms(view, torch.rand(576), 3)
    check_forms(poisoned(17, 64, dtype), None, 4)


@pytest.mark.parametrize("columns", [64, 111])
def test_any_layout_of_the_residual_is_written(columns):
    residual, x = torch.randn(columns, 3), torch.randn(3, columns)
    expected = reference.add(residual.T, x)
    add_rmsnorm_quantize(residual.T, x, None, EPS, torch.tensor(0.02), 8)
    assert_bits_equal(residual.T, expected)


def check_shift(x, weight, shift, bits=4):
    """Both operations that take a shift, unpacked and packed."""
    scale = torch.tensor(0.17)
    residual = torch.randn(x.shape).to(x.dtype)
    total = reference.add(residual, x)
    for packed in (False, True) if x.shape[-1] % 2 == 0 and bits <= 4 else (False,):
        q = rmsnorm_quantize(x, weight, EPS, scale, bits, packed, shift)
        expected = reference.rmsnorm_quantize(x, weight, EPS, scale, bits, packed, shift)
        assert_bits_equal(q, expected, "rmsnorm_quantize")
        copy = residual.clone()
        q = add_rmsnorm_quantize(copy, x, weight, EPS, scale, bits, packed, shift)
        assert_bits_equal(copy, total, "residual")
        expected = reference.rmsnorm_quantize(total, weight, EPS, scale, bits, packed, shift)
        assert_bits_equal(q, expected, "add_rmsnorm_quantize")


@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shift_of_every_dtype(isa, columns):
    for dtype, other, third in product(FLOAT_DTYPES, FLOAT_DTYPES, FLOAT_DTYPES):
        x, shift = outlier_rows(3, columns, dtype), torch.randn(columns).to(third)
        check_shift(x, torch.rand(columns).to(other), shift)
        if other == third:
            check_shift(x, None, shift, bits=8)


@pytest.mark.parametrize("shift_dtype", FLOAT_DTYPES)
def test_shift_on_every_thread(isa, shift_dtype):
    x = outlier_rows(137, 2050, torch.bfloat16)
    check_shift(x, torch.rand(2050), torch.randn(2050).to(shift_dtype))
    check_shift(strided(x), None, torch.randn(2050).to(shift_dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_shift_that_is_not_a_number_stays_in_its_channel(isa, dtype):
    x, weight, shift = torch.randn(3, 111), torch.rand(111), torch.randn(111).to(dtype)
    special = {5: "nan", 40: "inf", 110: "-inf"}
    for channel, value in special.items():
        shift[channel] = float(value)
    check_shift(x, weight, shift)
    check_shift(poisoned(17, 111, dtype), None, shift)
    q = rmsnorm_quantize(x, weight, EPS, torch.tensor(0.1), 4, shift=shift)
    assert (q[:, list(special)] == torch.tensor([0, -8, 7], dtype=torch.int8)).all()


def test_the_difference_is_rounded_by_itself(isa):
    """The shift is the normalized row: nothing is left. A fused product would leave its error."""
    x, weight = torch.randn(1, 576), torch.rand(576)
    for w in (weight, None):
        shift = reference.rmsnorm_float32(x, w, EPS)[0]
        assert (rmsnorm_quantize(x, w, EPS, torch.tensor(1e-10), 8, shift=shift) == 0).all()


@pytest.mark.parametrize("op", [rmsnorm_quantize, add_rmsnorm_quantize])
@pytest.mark.parametrize(
    "shift",
    [
        torch.zeros(24, dtype=torch.int8),
        torch.zeros(24, dtype=torch.float64),
        torch.zeros(1, 24),
        torch.zeros(23),
        torch.zeros(48)[::2],
        torch.tensor(0.0),
    ],
)
def test_wrong_shift_is_named(op, shift):
    rows = (torch.zeros(2, 24),) * (2 if op is add_rmsnorm_quantize else 1)
    arguments = (*rows, None, EPS, torch.tensor(0.1), 4)
    op(*arguments, shift=torch.zeros(24))
    with pytest.raises(ValueError, match=f"^{op.__name__}: shift: expected"):
        op(*arguments, shift=shift)


@pytest.mark.parametrize("weight", [None, torch.ones(16)])
def test_opcheck(weight):
    ops = torch.ops.prefixquant
    x, scale = torch.randn(3, 16), torch.tensor(0.1)
    torch.library.opcheck(ops.rmsnorm.default, (x, weight, EPS))
    for packed in (False, True):
        args = (x, weight, EPS, scale, 4, packed)
        torch.library.opcheck(ops.rmsnorm_quantize.default, args)
        torch.library.opcheck(ops.add_rmsnorm_quantize.default, (torch.randn(3, 16), *args))
        args = (*args, torch.randn(16).half())
        torch.library.opcheck(ops.rmsnorm_quantize.default, args)
        torch.library.opcheck(ops.add_rmsnorm_quantize.default, (torch.randn(3, 16), *args))
    torch.library.opcheck(ops.rmsnorm_quantize_dynamic.default, (x, weight, EPS, 8))
