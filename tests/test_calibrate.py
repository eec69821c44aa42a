# SPDX-License-Identifier: Apache-2.0
"""Calibration of one block."""

import torch
from prefixquant.block import PrefixKV, block_forward
from prefixquant.calibrate import Streams, _BlockQuantizer, calibrate_block
from prefixquant.config import Scheme
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations
from prefixquant.solvers import WeightSolver
from tiny_families import tiny_family


def decoder():
    model = tiny_family("llama")
    return FloatDecoder(model, plan_rotations(model_geometry(model.config)))


def quantizer(prefix_tokens: int) -> _BlockQuantizer:
    made = decoder()
    empty = torch.zeros(1, prefix_tokens, 16)
    scheme = Scheme(4, 4, 4)
    prefix = PrefixKV(empty, empty)
    counted = Counted((3, 8), prefix_tokens, 64.0, made.device).mask
    return _BlockQuantizer(
        made.block(0), made.shape, scheme, made.rope(8), prefix, WeightSolver(), 0.3, counted
    )


def test_outlier_at_position_0_counts_only_without_prefix():
    x = torch.randn(3, 8, 80)
    x[:, 0] *= 1000
    wanted = torch.randn(3, 8, 48)
    alone, behind_prefix = quantizer(0), quantizer(2)
    for each in (alone, behind_prefix):
        each.point("down", x, wanted)
    assert alone.scales.activations["down"] > 50 * behind_prefix.scales.activations["down"]
    x[:, 0] = 0
    ordinary = quantizer(2)
    ordinary.point("down", x, wanted)
    assert torch.equal(
        ordinary.scales.activations["down"], behind_prefix.scales.activations["down"]
    )
    assert torch.equal(ordinary.quantized["down"].q, behind_prefix.quantized["down"].q)


def test_an_outlier_token_of_one_sample_has_no_say_behind_a_prefix():
    """From the block on in which the float model shows it; what is left decides alone."""
    made = decoder()
    x = made.embed(torch.randint(0, 97, (3, 8), generator=torch.Generator().manual_seed(2)))
    block, rope, seen = made.block(0), made.rope(8), {}
    block_forward(block, made.shape, x, rope, tap=seen.__setitem__)
    # One channel of gate and up answers to token 5 of sample 1 and to no other.
    answer = torch.linalg.pinv(seen["gate_up"].flatten(0, 1))[:, 8 + 5]
    for role in ("gate", "up"):
        block.weights[role] = block.weights[role].clone()
        block.weights[role][0] = 50 * answer

    def calibrated(prefix_tokens, counted=None):
        empty = torch.zeros(1, prefix_tokens, 16)
        streams = Streams(x.clone(), x.clone(), counted)
        prefix = PrefixKV(empty, empty)
        found = calibrate_block(block, made.shape, Scheme(4, 4, 4), rope, prefix, streams)
        return found, streams.counted.mask

    alone, everyone = calibrated(0)
    behind, mask = calibrated(2)
    assert everyone.all()
    assert (~mask).nonzero().tolist() == [[0, 0], [1, 0], [1, 5], [2, 0]]
    assert alone.scales.activations["down"] > 20 * behind.scales.activations["down"]
    told = Counted((3, 8), 2, 1e30, made.device)  # one that finds nothing itself
    told.mask.copy_(mask)
    same, _ = calibrated(2, told)
    assert torch.equal(same.scales.activations["down"], behind.scales.activations["down"])
    assert torch.equal(same.weights["down"].q, behind.weights["down"].q)


def test_streams_advance_and_errors_are_reported():
    made = decoder()
    x = made.embed(torch.randint(0, 97, (2, 16)))
    streams = Streams(x.clone(), x.clone())
    result = calibrate_block(
        made.block(0), made.shape, Scheme(4, 8, 8), made.rope(16), made.prefix((3,))[0], streams
    )
    assert not torch.equal(streams.floating, x)
    error = (streams.quantized - streams.floating).square().sum()
    assert result.relative_error == (error / streams.floating.square().sum()).item()
    assert 0 < result.relative_error < 0.1
    assert set(result.weights) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert (result.scales.k == result.scales.k[0]).all()  # one scale a tensor at 8 bits
