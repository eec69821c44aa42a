# SPDX-License-Identifier: Apache-2.0
"""Weight solvers and scale searches: what they claim to minimise, they minimise."""

import pytest
import torch
from prefixquant.calibrate import search_activation_scale, search_head_scales
from prefixquant.quantizer import fake_quantize, minmax_scale, qrange, quantize
from prefixquant.solvers import solve_rtn


def test_quantizer_levels_and_ties():
    scale = torch.tensor(0.5)
    x = torch.tensor([-100.0, -0.25, 0.25, 0.75, 1.25, 100.0])  # ties go to the even level
    assert quantize(x, scale, 4).tolist() == [-8, -0.0, 0, 2, 2, 7]
    assert qrange(4) == (-8, 7)
    assert minmax_scale(torch.tensor(7.5), 4) == 1.0


@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_is_the_best_of_its_grid(bits):
    weight = torch.randn(7, 33)
    weight[2, 5] = 9.0  # an outlier row wants to clip
    x = torch.randn(100, 33) * torch.linspace(0.1, 3, 33)
    hessian = x.T @ x
    ratios = torch.linspace(1.0, 0.5, 21)
    solved = solve_rtn(weight, bits, hessian, ratios)
    assert solved.q.dtype == torch.int8
    assert solved.q.min() >= qrange(bits)[0]
    assert solved.q.max() <= qrange(bits)[1]
    start = minmax_scale(weight.abs().amax(1), bits)
    error = ((solved.dequantize() - weight) @ x.T).square().sum(1)
    for ratio in ratios:
        other = fake_quantize(weight, (start * ratio)[:, None], bits)
        assert (error <= ((other - weight) @ x.T).square().sum(1) * 1.0001 + 1e-6).all()


def test_rtn_of_zero_rows():
    solved = solve_rtn(torch.zeros(3, 8), 4, torch.eye(8))
    assert not solved.q.any()
    assert (solved.scale > 0).all()


def test_activation_search_clips_where_few_values_are_large():
    x = torch.randn(512, 32)
    x[0, 0] = 40.0
    weight = torch.randn(16, 32)
    scale = search_activation_scale(x, [weight], 4)
    start = minmax_scale(x.abs().max(), 4)

    def error(s):
        return ((fake_quantize(x, s, 4) - x) @ weight.T).square().sum()

    assert scale < 0.6 * start
    assert error(scale) < 0.7 * error(start)


def test_head_scales_are_found_per_head():
    x = torch.randn(2, 3, 64, 8) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    scale = search_head_scales(x, torch.eye(8).expand(3, 8, 8), 4)
    assert (scale[1:] / scale[:-1] > 5).all()
