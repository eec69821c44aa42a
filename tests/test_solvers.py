# SPDX-License-Identifier: Apache-2.0
"""Weight solvers and scale searches: what they claim to minimise, they minimise."""

import itertools

import pytest
import torch
from prefixquant.calibrate import search_activation_scale, search_head_scales
from prefixquant.quantizer import fake_quantize, minmax_scale, qrange, quantize
from prefixquant.solvers import (
    WeightSolver,
    layer_error,
    solve_gptq,
    solve_quantease,
    solve_quantease_outlier,
    solve_rtn,
)
from prefixquant.solvers.gptq import gptq_levels, inverse_factor
from prefixquant.solvers.quantease import Descent
from prefixquant.solvers.weight import column_scales, damped, row_errors


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
    x = torch.randn(3, 128, 8) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    scale = search_head_scales(x, torch.eye(8).expand(3, 8, 8), 4)
    assert (scale[1:] / scale[:-1] > 5).all()


# ---------------------------------------------------------------------------- layer solvers


def layer(rows=24, columns=96, tokens=400, seed=0):
    """A weight and the Hessian of inputs that are as unequal and as correlated as real ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[3] *= 20
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) * torch.linspace(0.05, 3, columns)
    x = x @ (mixing + torch.eye(columns))
    return weight, x.T @ x / tokens


def test_gptq_is_obq_in_a_fixed_order():
    """Each column rounded, those left moved by the inverse Hessian *of those left*, in float64."""
    weight, hessian = layer(rows=6, columns=150)  # more columns than a block
    scale = solve_rtn(weight, 4, hessian).scale
    order, factor = inverse_factor(hessian)
    found = gptq_levels(weight, scale[:, None], 4, order, factor)

    left, moved = order.tolist(), weight.double().clone()
    expected = torch.empty_like(moved)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        expected[:, j] = (moved[:, j] / scale).round().clamp(-8, 7)
        error = (moved[:, j] - expected[:, j] * scale) / inverse[0, 0]
        moved[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    assert (found != expected).float().mean() < 0.002  # a float32 value beside a rounding tie


def naive_sweep(target, hessian, levels, scales, bits, relaxed):
    """The paper's update, float64, one column at a time from the whole weight."""
    qmin, qmax = qrange(bits)
    for j in range(target.shape[1]):
        others = (levels * scales) @ hessian[:, j] - levels[:, j] * scales[:, j] * hessian[j, j]
        beta = (target @ hessian[:, j] - others) / hessian[j, j] / scales[:, j]
        levels[:, j] = beta if relaxed else beta.round().clamp(qmin, qmax)


@pytest.mark.parametrize("group_size", [0, 75])
@pytest.mark.parametrize("relaxed", [False, True])
def test_blocked_sweep_is_the_sweep_of_single_columns(group_size, relaxed):
    weight, hessian = layer(columns=150)
    start = solve_rtn(weight, 3, hessian, group_size=group_size)
    state = Descent(weight, start.q, start.scale, 3, hessian)
    state.sweep(relaxed)
    levels = start.q.double()
    scales = column_scales(start.scale, 150).expand(-1, 150).double()
    naive_sweep(weight.double(), hessian.double(), levels, scales, 3, relaxed)
    if relaxed:
        torch.testing.assert_close(state.levels.T, levels.float(), rtol=1e-3, atol=1e-3)
    else:
        assert (levels != state.levels.T).float().mean() < 0.002
    expected = state.levels.T * scales.float() - weight
    torch.testing.assert_close(state.delta.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_quantized_sweeps_and_scale_fits_never_raise_the_objective(bits, group_size):
    weight, hessian = layer()
    start = solve_rtn(weight, bits, hessian, group_size=group_size)
    state = Descent(weight, start.q, start.scale, bits, hessian)
    before = state.errors()
    rounding = 1e-5 * before  # float32 sums
    for _ in range(8):
        state.sweep()
        after = state.errors()
        assert (after <= before + rounding).all()
        told = state.refit_scales()
        before, after = after, state.errors()
        assert (after <= before + rounding).all()
        torch.testing.assert_close(told, after, rtol=1e-4, atol=1e-5)
        before = after
    assert state.levels.min() >= qrange(bits)[0]
    assert state.levels.max() <= qrange(bits)[1]


def test_descent_ends_where_no_single_level_can_improve():
    weight, hessian = layer(rows=4, columns=40)
    start = solve_rtn(weight, 4, hessian)
    state = Descent(weight, start.q, start.scale, 4, hessian)
    for _ in range(60):
        state.sweep()
    best = state.errors()
    for j in range(40):
        for step in (-1, 1):
            levels = state.levels.clone()
            levels[j] = (levels[j] + step).clamp(-8, 7)
            error = row_errors((levels * state.scale).T - weight, hessian)
            assert (error >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_solver_ends_at_or_under_the_one_before(bits, group_size):
    weight, hessian = layer()
    metric = damped(hessian, 0.01)
    history = []
    rtn = solve_rtn(weight, bits, hessian, group_size=group_size)
    gptq = solve_gptq(weight, bits, hessian, group_size=group_size)
    quantease = solve_quantease(weight, bits, hessian, group_size=group_size, history=history)
    errors = [row_errors(solved.dequantize() - weight, metric) for solved in (rtn, gptq, quantease)]
    assert errors[1].sum() < 0.9 * errors[0].sum()
    assert (errors[2] <= errors[1] * (1 + 1e-5)).all()  # row by row
    if bits < 8:
        assert (errors[2] / errors[1]).median() < 0.99
    assert len(history) == 25
    assert sum(sweep.relaxed for sweep in history) == 7
    assert not any(sweep.relaxed for sweep in history[-4:])
    kept = [sweep.kept for sweep in history]
    assert all(b <= a for a, b in itertools.pairwise(kept))
    for one, next_one in itertools.pairwise(history):
        if not (one.relaxed or next_one.relaxed):
            assert next_one.objective <= one.objective * (1 + 1e-5)
    torch.testing.assert_close(errors[2].sum().item(), kept[-1], rtol=1e-4, atol=0)
    for solved in (rtn, gptq, quantease):
        assert solved.q.dtype == torch.int8
        assert solved.scale.dtype == torch.float32
        assert solved.scale.shape == ((24, 3) if group_size else (24,))
        assert (solved.scale > 0).all()
        assert solved.q.min() >= qrange(bits)[0]
        assert solved.q.max() <= qrange(bits)[1]


def test_groups_fit_columns_of_unequal_size():
    weight, hessian = layer()
    weight[:, :32] *= 10
    for solve in (solve_rtn, solve_gptq, solve_quantease):
        whole = layer_error(weight, solve(weight, 3, hessian), hessian)
        assert layer_error(weight, solve(weight, 3, hessian, group_size=32), hessian) < 0.75 * whole


@pytest.mark.parametrize("name", ["rtn", "gptq", "quantease", "quantease-outlier"])
def test_inputs_that_are_always_zero_and_rows_of_zeros(name):
    weight, hessian = layer()
    hessian[:, 5:9] = hessian[5:9] = 0
    weight[7] = 0
    (solved,) = WeightSolver(name, outlier_fraction=0.01)([weight], 4, hessian)
    assert torch.isfinite(solved.dequantize()).all()
    assert not solved.q[7].any()
    assert (solved.scale > 0).all()
    (solved,) = WeightSolver(name)([weight], 4, torch.zeros_like(hessian))
    assert torch.isfinite(solved.dequantize()).all()


@pytest.mark.parametrize("name", ["rtn", "gptq", "quantease"])
def test_linears_of_one_input_are_solved_as_if_alone(name):
    weight, hessian = layer()
    parts = weight.split((16, 5, 3))
    for part, solved in zip(parts, WeightSolver(name)(list(parts), 4, hessian), strict=True):
        (alone,) = WeightSolver(name)([part], 4, hessian)
        torch.testing.assert_close(alone.scale, solved.scale, rtol=1e-3, atol=0)
        assert (alone.q != solved.q).float().mean() < 0.02  # other blocking, other last bits


def test_groups_must_fill_the_row():
    weight, hessian = layer()
    for solve in (solve_rtn, solve_gptq, solve_quantease):
        with pytest.raises(ValueError, match="group_size: expected 0 or a divisor of 96"):
            solve(weight, 4, hessian, group_size=36)
    with pytest.raises(ValueError, match="solver: expected one of rtn, gptq, quantease"):
        WeightSolver("magic")([weight], 4, hessian)


# ---------------------------------------------------------------------------- outliers


def test_outliers_are_as_many_as_asked_and_lower_the_error():
    weight, hessian = layer()
    weight[3] /= 20
    weight.view(-1)[::97] = 15  # 24 of 2304 entries
    metric = damped(hessian, 0.01)
    history = []
    plain = layer_error(weight, solve_quantease(weight, 3, hessian), metric)
    errors = []
    for fraction in (0.005, 0.011):
        history.clear()
        solved = solve_quantease_outlier(weight, 3, hessian, fraction=fraction, history=history)
        index = solved.outliers.index
        assert len(index) == len(solved.outliers.value) == int(fraction * weight.numel())
        assert (index[1:] > index[:-1]).all()
        assert index[-1] < weight.numel()
        assert solved.q.min() >= -4
        assert solved.q.max() <= 3
        errors.append(layer_error(weight, solved, metric))
        total = row_errors(weight, metric).sum().item()
        assert history[-1].kept / total == pytest.approx(errors[-1].item(), rel=1e-3)
    assert errors[0] < 0.9 * plain
    assert errors[1] < 0.2 * plain
    assert set(range(0, weight.numel(), 97)) - set(index.tolist()) == set()


def test_outlier_values_are_the_best_for_their_support():
    """At the end no entry of the support could lower the error by another value."""
    weight, hessian = layer()
    metric = damped(hessian, 0.01)
    solved = solve_quantease_outlier(weight, 3, hessian, fraction=0.02, sweeps=60)
    gradient = (solved.dequantize() - weight) @ metric
    step = (gradient / metric.diagonal()).flatten()
    # What is left: the last fit of the scales moved the others once more.
    assert step[solved.outliers.index].abs().max() < 0.04 * step.abs().max()


def test_no_outliers_is_quantease():
    weight, hessian = layer()
    plain = solve_quantease(weight, 3, hessian)
    none = solve_quantease_outlier(weight, 3, hessian, fraction=0.0001)
    assert none.outliers is None
    assert torch.equal(none.q, plain.q)
    with pytest.raises(ValueError, match=r"fraction: expected 0 to 1, got -0\.1"):
        solve_quantease_outlier(weight, 3, hessian, fraction=-0.1)


def test_all_entries_outliers_is_the_weight():
    weight, hessian = layer()
    solved = solve_quantease_outlier(weight, 2, hessian, fraction=1.0)
    torch.testing.assert_close(solved.dequantize(), weight, rtol=1e-3, atol=1e-3)


def test_scale_fit_leaves_free_values_alone():
    weight, hessian = layer()
    free = torch.rand_like(weight) < 0.05
    start = solve_rtn(weight, 3, hessian, group_size=32)
    state = Descent(weight, start.q, start.scale * 1.2, 3, hessian, free)
    state.sweep()
    values = (state.levels * state.column_scales())[free.T]
    before = state.errors()
    state.refit_scales()
    torch.testing.assert_close((state.levels * state.column_scales())[free.T], values)
    assert (state.errors() <= before * (1 + 1e-5)).all()
    expected = state.levels * state.column_scales() - weight.T
    torch.testing.assert_close(state.delta, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_size", [0, 96])
def test_scale_fit_is_least_squares(group_size):
    """Against float64; one scale a row goes another way than groups do (96 columns: one group)."""
    weight, hessian = layer()
    start = solve_rtn(weight, 3, hessian, group_size=group_size)
    free = torch.zeros_like(weight, dtype=torch.bool) if group_size else None
    state = Descent(weight, start.q, start.scale * 1.3, 3, hessian, free)
    state.refit_scales()
    u, wide = start.q.double(), hessian.double()
    expected = ((weight.double() @ wide) * u).sum(1) / ((u @ wide) * u).sum(1)
    torch.testing.assert_close(state.scale[0], expected.float(), rtol=1e-4, atol=0)
