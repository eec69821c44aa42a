# SPDX-License-Identifier: Apache-2.0
"""quantize_static against the reference, bit for bit."""

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant.ops import quantize_static


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_bits(isa, dtype, bits):
    x = poisoned(17, 576, dtype)
    scale = torch.tensor(0.37)
    assert_bits_equal(quantize_static(x, scale, bits), reference.quantize_static(x, scale, bits))


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("columns", COLUMN_COUNTS)
def test_shapes(isa, rows, columns):
    scale = torch.tensor(0.11)
    for dtype in FLOAT_DTYPES:
        x = poisoned(rows, columns, dtype)
        assert_bits_equal(quantize_static(x, scale, 4), reference.quantize_static(x, scale, 4))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided(isa, dtype):
    scale = torch.tensor(0.11)
    x = outlier_rows(17, 137, dtype)
    for view in (strided(x), x.T, x[::2], x[:, ::3], x[3], x.view(17, 1, 137), strided(x)[None]):
        assert_bits_equal(
            quantize_static(view, scale, 8), reference.quantize_static(view, scale, 8)
        )


def test_every_float16(isa):
    """All 65536 bit patterns: the conversion, the ties and the non-numbers."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    for value in (1.0, 0.5, 3e-8, 700.0):
        scale = torch.tensor(value)
        assert_bits_equal(quantize_static(x, scale, 8), reference.quantize_static(x, scale, 8))


def test_ties_round_to_even(isa):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 7.5, -8.5, -9.5])
    q = quantize_static(x, torch.tensor(1.0), 4)
    assert q.tolist() == [0, 2, 2, 0, -2, -2, 6, 7, -8, -8]


@pytest.mark.parametrize("value", [1e-38, 1e-20, 1e20, 3e38])
def test_extreme_scales(isa, value):
    x = poisoned(3, 64, torch.float32)
    scale = torch.tensor(value)
    assert_bits_equal(quantize_static(x, scale, 8), reference.quantize_static(x, scale, 8))


def test_threads_do_not_change_the_result():
    x = outlier_rows(1000, 333, torch.bfloat16)
    scale = torch.tensor(0.2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize_static(x, scale, 4)
        torch.set_num_threads(3)
        assert_bits_equal(quantize_static(x, scale, 4), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_opcheck(dtype):
    args = (torch.randn(3, 16, dtype=dtype), torch.tensor(0.1), 4)
    torch.library.opcheck(torch.ops.prefixquant.quantize_static.default, args)
