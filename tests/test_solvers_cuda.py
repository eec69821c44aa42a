# SPDX-License-Identifier: Apache-2.0
"""The weight solvers on a GPU: the Triton kernel against the torch loop, and the same results."""

import pytest
import torch
from prefixquant.solvers import WeightSolver, layer_error
from prefixquant.solvers.columns import _has_triton, round_columns, round_columns_torch
from test_solvers import layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 10, 64, 128])
@pytest.mark.parametrize("rows", [1, 33, 576])
def test_kernel_rounds_as_torch_does(bits, columns, rows):
    if not _has_triton():
        pytest.skip("no Triton, or no C compiler for its launchers")
    torch.manual_seed(0)
    base, reference = torch.randn(2, columns, rows, device="cuda").unbind()
    mixing = torch.randn(columns, columns, device="cuda") * 0.1
    free = torch.rand(columns, rows, device="cuda") < 0.1
    for steps in (torch.rand(1, rows), torch.rand(columns, rows)):
        steps = (steps.cuda() + 0.2).expand(columns, rows)
        for known in (None, reference):
            for unrounded in (None, free):
                found = round_columns(base, steps, mixing, bits, known, unrounded)
                expected = round_columns_torch(base, steps, mixing, bits, known, unrounded)
                # A value beside a rounding tie may go the other way, and those behind it with it.
                wrong = (found - expected).abs() > 1e-3
                assert wrong.float().mean() < 0.005


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("name", ["rtn", "gptq", "quantease", "quantease-outlier"])
def test_same_error_as_on_the_cpu(name, group_size):
    weight, hessian = layer()
    solver = WeightSolver(name, group_size, outlier_fraction=0.01)
    (here,) = solver([weight], 3, hessian)
    (there,) = solver([weight.cuda()], 3, hessian.cuda())
    found = layer_error(weight.cuda(), there, hessian.cuda()).item()
    assert found == pytest.approx(layer_error(weight, here, hessian).item(), rel=0.03)
