# SPDX-License-Identifier: Apache-2.0
"""outlier_scan on CUDA against the CPU reference, bit for bit."""

import pytest
import reference
import torch
from cases import COLUMN_COUNTS, FLOAT_DTYPES, ROW_COUNTS, outlier_rows, poisoned, strided
from compare import assert_bits_equal
from prefixquant import _C
from prefixquant.ops import outlier_scan

pytestmark = pytest.mark.gpu
if not (_C.with_cuda and torch.cuda.is_available()):
    pytest.skip("needs a CUDA build and a CUDA device", allow_module_level=True)


def check(x, eta=64.0, view=lambda t: t):
    found = outlier_scan(view(x.cuda()), eta)
    for actual, expected in zip(found, reference.outlier_scan(view(x), eta), strict=True):
        assert_bits_equal(actual.cpu(), expected)


@pytest.mark.parametrize("rows", [*ROW_COUNTS, 2, 1000, 5000, 70000])
@pytest.mark.parametrize("columns", [*COLUMN_COUNTS, 14336])
def test_shapes(rows, columns):
    if rows * columns > 5e7:
        pytest.skip("larger than this test needs")
    for dtype in FLOAT_DTYPES:
        check(outlier_rows(rows, columns, dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_not_a_number_infinity_and_zeros(dtype):
    check(poisoned(17, 64, dtype))
    check(poisoned(5000, 128, dtype))
    x = outlier_rows(17, 64, dtype)
    x[3, 5] = -float("inf")
    check(x)
    check(torch.zeros(9, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided_and_misaligned(dtype):
    x = outlier_rows(64, 112, dtype)
    for view in (strided, lambda t: t.T, lambda t: t[::2], lambda t: t[:, 1:], lambda t: t[:, ::2]):
        check(x, view=view)


@pytest.mark.parametrize("values", [1, 2, 50, 5000])
def test_median_of_repeated_values(values):
    x = torch.randint(0, values, (20001, 1)).float() + 0.5
    check(x)
    check(x[:-1])


def test_graph():
    x = outlier_rows(300, 576, torch.bfloat16)
    static = x.cuda()
    outlier_scan(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = outlier_scan(static)
    for source in (x, x.flip(0) * 2):
        static.copy_(source)
        graph.replay()
        for actual, expected in zip(found, reference.outlier_scan(source, 64.0), strict=True):
            assert_bits_equal(actual.cpu(), expected)


def test_opcheck():
    args = (torch.randn(5, 16, device="cuda"), 64.0)
    torch.library.opcheck(torch.ops.prefixquant.outlier_scan.default, args)
