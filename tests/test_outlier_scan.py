# SPDX-License-Identifier: Apache-2.0
"""outlier_scan against the reference, bit for bit."""

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant.ops import outlier_scan


def check(x, eta=64.0):
    names = ("row_max", "median", "is_outlier")
    for name, actual, expected in zip(
        names, outlier_scan(x, eta), reference.outlier_scan(x, eta), strict=True
    ):
        assert_bits_equal(actual, expected, name)


@pytest.mark.parametrize("rows", [*ROW_COUNTS, 2, 4, 1000])
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shapes(isa, rows, columns):
    for dtype in FLOAT_DTYPES:
        check(outlier_rows(rows, columns, dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_not_a_number_and_infinity(isa, dtype):
    check(poisoned(17, 64, dtype))
    x = outlier_rows(17, 64, dtype)
    x[3, 5] = -float("inf")
    check(x)
    assert outlier_scan(x, 64.0)[2][3]
    x[4, 5] = float("nan")
    row_max, median, is_outlier = outlier_scan(x, 64.0)
    assert row_max.isnan().tolist() == [t == 4 for t in range(17)]
    assert median.isnan()
    assert not is_outlier.any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided(isa, dtype):
    x = outlier_rows(64, 111, dtype)
    for view in (strided(x), x.T, x[::2], x[:, ::2]):
        check(view)


def test_zero_median(isa):
    x = torch.zeros(9, 16)
    x[2, 3] = 1e-30
    check(x)
    assert outlier_scan(x, 64.0)[2].tolist() == [t == 2 for t in range(9)]


def test_the_threshold_is_strict(isa):
    x = torch.ones(5, 4)
    x[1] = 64.0
    x[2] = torch.nextafter(torch.tensor(64.0), torch.tensor(65.0))
    assert outlier_scan(x, 64.0)[2].tolist() == [False, False, True, False, False]


def test_finds_the_outlier_tokens():
    x = torch.randn(512, 1536)
    x[0] *= 2450.0
    x[100] *= 95.0
    assert outlier_scan(x)[2].nonzero().flatten().tolist() == [0, 100]


def test_opcheck():
    args = (torch.randn(5, 16), 64.0)
    torch.library.opcheck(torch.ops.prefixquant.outlier_scan.default, args)
