# SPDX-License-Identifier: Apache-2.0
"""A quantized block whose weights and scales are parameters."""

import copy

import pytest
import torch
from finetune_cases import Setting, same_block
from prefixquant.block import block_forward
from prefixquant.errors import UserError
from prefixquant.finetune import Learned, LearnedBlock


@pytest.mark.parametrize(
    "scheme", ["w4a4kv4", "w4a8kv8", "w8a8kv16", "w4a16kv4", "w4a4dkv4d", "w4a4ckv4"]
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_learned_block_starts_as_it_was_calibrated(scheme, weights):
    setting = Setting("qwen3", scheme)
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned(weights, True, True))
    frozen, prefix = learned.freeze()
    assert same_block(frozen, block)
    assert torch.equal(prefix.key, setting.prefix[0].key)
    weights_now, scales, _ = learned.materialize()
    x = setting.decoder.embed(setting.ids[:2])
    arguments = (setting.decoder.shape, x, setting.decoder.rope(24), setting.prefix[0])
    expected = block_forward(block.simulated, *arguments, block.scales)
    found = block_forward(weights_now, *arguments, scales)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_companded_biases_are_trained_in_units_of_the_same_size():
    """The scale itself is that of 8 bits."""
    units = {}
    for scheme in ("w4a4kv4", "w4a4ckv4"):
        setting = Setting("llama", scheme)
        original, block = setting.calibrated(0)
        learned = LearnedBlock(block, original, setting.prefix[0], Learned())
        units[scheme] = torch.cat([learned.get_buffer(f"bias_unit_{r}") for r in learned.biases])
    ratio = units["w4a4ckv4"] / units["w4a4kv4"]
    assert ratio.min() > 0.7
    assert ratio.max() < 2


def test_integers_of_a_solver_survive_the_latent_weights():
    """A solver may round a weight to another neighbour than the nearest."""
    setting = Setting()
    original, block = setting.calibrated(0)
    for solved in block.weights.values():
        moved = torch.randint(-1, 2, solved.q.shape, dtype=torch.int8)
        solved.q = (solved.q + moved).clamp_(-8, 7)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned())
    assert same_block(learned.freeze()[0], block)


def test_every_learned_tensor_gets_a_gradient():
    setting = Setting("qwen3")
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned(True, True, True))
    weights, scales, prefix = learned.materialize()
    x = setting.decoder.embed(setting.ids[:2])
    out = block_forward(weights, setting.decoder.shape, x, setting.decoder.rope(24), prefix, scales)
    out.square().sum().backward()
    for name, parameter in learned.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_frozen_block_stays_when_the_next_takes_its_place(family):
    setting = Setting(family)
    original, block = setting.calibrated(0)
    learned = LearnedBlock(block, original, setting.prefix[0], Learned())
    frozen, prefix = learned.freeze()
    kept = copy.deepcopy((frozen, prefix))
    with torch.no_grad():
        for tensor in (*learned.parameters(), *learned.buffers()):
            tensor.add_(1)
    assert same_block(frozen, kept[0])
    assert torch.equal(prefix.key, kept[1].key)
    for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
        mine, theirs = (getattr(b.simulated, name) for b in (frozen, kept[0]))
        assert mine is theirs is None or torch.equal(mine, theirs)
    for name in ("biases", "shifts"):
        mine, theirs = (getattr(b.simulated, name) for b in (frozen, kept[0]))
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] is value is None or torch.equal(mine[key], value)


def test_heads_keep_one_scale_at_8_bits():
    setting = Setting("llama", "w4a8kv8")
    original, block = setting.calibrated(0)
    block.scales.k = block.scales.k.expand(3).contiguous()  # as if there were three heads
    block.scales.v = block.scales.v.expand(3).contiguous()
    learned = LearnedBlock(block, original, setting.prefix[0], Learned())
    with torch.no_grad():
        learned.scale_theta += torch.randn_like(learned.scale_theta)
    scales = learned.freeze()[0].scales
    assert scales.k.shape == scales.v.shape == (3,)
    assert (scales.k == scales.k[0]).all()
    assert not torch.equal(scales.k, block.scales.k)


def test_grouped_scales_are_refused():
    setting = Setting()
    original, block = setting.calibrated(0)
    block.weights["q"].scale = block.weights["q"].scale[:, None].repeat(1, 2)
    with pytest.raises(UserError, match="one scale a channel"):
        LearnedBlock(block, original, setting.prefix[0], Learned())
