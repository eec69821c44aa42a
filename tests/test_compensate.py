# SPDX-License-Identifier: Apache-2.0
"""Weights that make up for earlier errors: the ridge regression, and what it does to a block."""

import pytest
import torch
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.compensate import compensate, input_shortfall, output_shortfall
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.decoder import FloatDecoder
from prefixquant.errors import UserError
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations
from tiny_families import FAMILIES, tiny_family


def moments(rows):
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("strength", [1e-3, 0.3, 10.0])
def test_is_the_ridge_regression(strength):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    target = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    hessian = moments(rows)
    moved = compensate(weight, hessian, output_shortfall(weight, target, rows, hessian), strength)
    # The same problem as one least-squares system: rows for the data, rows for the ridge.
    ridge = (strength * hessian.diagonal().mean() * len(rows)).sqrt() * torch.eye(12).double()
    system = torch.cat((rows, ridge))
    expected = torch.linalg.lstsq(system, torch.cat((target, ridge @ weight.T))).solution.T
    torch.testing.assert_close(moved, expected)


def test_inputs_and_outputs_say_the_same():
    generator = torch.Generator().manual_seed(1)
    floating, noise = torch.randn(2, 40, 8, generator=generator)
    rows = floating + 0.3 * noise
    weight = torch.randn(6, 8, generator=generator)
    hessian = moments(rows)
    torch.testing.assert_close(
        input_shortfall(weight, floating, rows, hessian),
        output_shortfall(weight, floating @ weight.T, rows, hessian),
    )


def test_right_inputs_leave_the_weights():
    rows = torch.randn(40, 8)
    weight = torch.randn(6, 8)
    hessian = moments(rows)
    moved = compensate(weight, hessian, input_shortfall(weight, rows, rows, hessian), 0.3)
    torch.testing.assert_close(moved, weight)


def test_fewer_rows_than_columns_and_dead_inputs():
    rows = torch.randn(5, 16)
    rows[:, 3] = 0
    weight, target = torch.randn(2, 16), torch.randn(5, 2)
    hessian = moments(rows)
    moved = compensate(weight, hessian, output_shortfall(weight, target, rows, hessian), 0.3)
    assert moved.isfinite().all()
    torch.testing.assert_close(moved[:, 3], weight[:, 3])
    nothing = torch.zeros(16, 16)
    assert torch.equal(compensate(weight, nothing, torch.zeros(2, 16), 0.3), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_comes_out_nearer_to_the_float_model(family):
    model = tiny_family(family)
    decoder = FloatDecoder(model, plan_rotations(model_geometry(model.config)))
    generator = torch.Generator().manual_seed(0)
    ids, unseen = torch.randint(0, 97, (2, 48, 64), generator=generator)
    errors = {}
    for strength in (0.0, 0.3):
        streams = [Streams(decoder.embed(x), decoder.embed(x)) for x in (ids, unseen)]
        rope, prefix = decoder.rope(64), decoder.prefix((3,))
        for index in range(len(decoder)):
            block, where = decoder.block(index), (rope, prefix[index])
            made = calibrate_block(
                block, decoder.shape, Scheme(4, 4, 4), *where, streams[0], compensation=strength
            )
            advance(streams[1], block, made, decoder.shape, *where)
        errors[strength] = [relative_error(each) for each in streams]
    for index in range(2):  # on the samples it was fitted on, and on others
        assert errors[0.3][index] < 0.8 * errors[0.0][index]


def advance(streams, block, made, shape, rope, prefix):
    from prefixquant.block import block_forward

    streams.floating = block_forward(block, shape, streams.floating, rope, prefix)
    streams.quantized = block_forward(
        made.simulated, shape, streams.quantized, rope, prefix, made.scales
    )


def relative_error(streams):
    delta = (streams.quantized - streams.floating)[:, 1:].square().sum()
    return (delta / streams.floating[:, 1:].square().sum()).item()


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_wrong_strength_is_refused(strength):
    with pytest.raises(UserError, match="compensation: expected a number >= 0"):
        RecipeConfig(compensation=strength)
