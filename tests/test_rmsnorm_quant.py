# SPDX-License-Identifier: Apache-2.0
"""rmsnorm_quantize against the reference, bit for bit.

The kernel and the reference sum the squares in float64 in different orders. That moves rstd by at
most a float32 ulp, in about one row of 10^8, and a level only at a tie: with the fixed seeds here
it does not occur.
"""

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant.ops import rmsnorm_quantize

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


@pytest.mark.parametrize("weight", [None, torch.ones(16)])
def test_opcheck(weight):
    args = (torch.randn(3, 16), weight, EPS, torch.tensor(0.1), 4)
    torch.library.opcheck(torch.ops.prefixquant.rmsnorm_quantize.default, args)
