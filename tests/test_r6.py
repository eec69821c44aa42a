# SPDX-License-Identifier: Apache-2.0
"""R6 from the recipe to the checkpoint: what is stored is the model that was calibrated."""

import json

import pytest
import torch
from prefixquant.block import BlockScales, block_forward
from prefixquant.checkpoint import CONFIG_NAME
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.decoder_setup import make_decoder
from prefixquant.finetune import Learned, LearnedBlock
from prefixquant.quantize import quantize
from prefixquant.roles import LINEARS, model_geometry
from prefixquant.rotate import plan_rotations
from prefixquant.simulate import SimulatedModel
from prefixquant.text import sample_windows
from prefixquant.workflow import hf_config_dict, write_checkpoint
from tiny_families import FAMILIES, tiny_family
from tiny_model import byte_tokenizer

CALIBRATION = torch.randint(0, 97, (900,), generator=torch.Generator().manual_seed(1))


def recipe_of(scheme="w4a4kv4", **changes):
    return RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix="text:ab",
        nsamples=2,
        seqlen=32,
        search_samples=8,
        search_seqlen=64,
        **changes,
    )


def saved(folder, family, recipe, model=None):
    model = tiny_family(family) if model is None else model
    made = quantize(model, byte_tokenizer(), recipe, CALIBRATION)
    config = hf_config_dict(model, made.tensors)
    write_checkpoint(folder, made.tensors, config, made.quantization)
    return made


def decoder_of(model, recipe, prefix):
    samples = sample_windows(CALIBRATION, recipe.search_samples, recipe.search_seqlen, recipe.seed)
    plan = plan_rotations(model_geometry(model.config), **recipe.rotation_options)
    return make_decoder(model, plan, samples, prefix, recipe)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_shifts_are_stored_as_they_were_calibrated(tmp_path, family, dtype, balance):
    """Bit for bit, in float16 (of a float32 model) and bfloat16."""
    model = tiny_family(family).to(dtype)
    recipe = recipe_of(solver="rtn", compensation=0, balance=balance)
    made = saved(tmp_path / "q", family, recipe, model)
    decoder = decoder_of(model, recipe, made.quantization.prefix_token_ids)
    simulated = SimulatedModel(tmp_path / "q")
    assert simulated.shape == decoder.shape
    assert simulated.shape.r6_size == 48
    for index in range(2):
        block, (stored, _, _) = decoder.block(index), simulated.blocks[index]
        for norm in ("input_norm", "post_norm"):
            assert torch.equal(getattr(stored, norm), getattr(block, norm))
            assert getattr(stored, norm).std() > 0.05
        for point in ("qkv", "gate_up"):
            assert torch.equal(stored.shifts[point], block.shifts[point])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_computes_the_model(tmp_path, family):
    """Its activations not quantized, 4-bit weights are all that is between it and the float model;
    read as one without R6 it is something else."""
    recipe = recipe_of(solver="rtn", compensation=0)
    made = saved(tmp_path / "q", family, recipe)
    ids = torch.randint(0, 97, (2, 24))
    model, prefix = tiny_family(family), made.quantization.prefix_token_ids
    in_front = torch.tensor(prefix).expand(2, -1)
    expected = model(torch.cat([in_front, ids], dim=1)).logits[:, len(prefix) :]

    def error(folder):
        simulated = SimulatedModel(folder)
        simulated.blocks = [(b, p, BlockScales()) for b, p, _ in simulated.blocks]
        found = simulated(ids).logits
        return ((found - expected).square().sum() / expected.square().sum()).item()

    assert error(tmp_path / "q") < 0.15  # measured: 0.006 to 0.09
    path = tmp_path / "q" / CONFIG_NAME
    config = json.loads(path.read_text())
    config["quantization_config"]["rotations"]["r6"] = False
    path.write_text(json.dumps(config))
    assert error(tmp_path / "q") > 0.8  # measured: 1.1 to 2.4


def test_8_bit_activations_keep_r1_and_norms_of_ones(tmp_path):
    made = saved(tmp_path / "q", "llama", recipe_of("w4a8kv4"))
    rotations = made.quantization.rotations
    assert rotations.r1
    assert not rotations.r6
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(made.tensors[f"model.layers.1.{name}.weight"], torch.ones(48).half())


@pytest.mark.parametrize("norms", [False, True])
def test_a_learned_block_starts_and_ends_with_the_norms_of_the_balance(norms):
    """Trained or not: the function at the start is that of the block behind R6, and another block
    that takes its place brings its own norms."""
    from prefixquant.calibrate import Streams, calibrate_block

    model, recipe = tiny_family("llama"), recipe_of()
    decoder = decoder_of(model, recipe, (3,))
    prefix = decoder.prefix((3,))
    x = decoder.embed(sample_windows(CALIBRATION, 4, 24, 0))
    streams, rope = Streams(x.clone(), x.clone()), decoder.rope(24)
    learned = []
    with torch.no_grad():
        for index in range(2):
            arrangement = decoder.shape, recipe.scheme, rope, prefix[index], streams
            original = decoder.block(index)
            block = calibrate_block(original, *arrangement)
            made = LearnedBlock(block, original, prefix[index], Learned(norms=norms))
            learned.append((block, made))
            weights, scales, kv = made.materialize()
            same = block_forward(weights, decoder.shape, x, rope, kv, scales)
            expected = block_forward(
                block.simulated, decoder.shape, x, rope, prefix[index], block.scales
            )
            torch.testing.assert_close(same, expected, rtol=0, atol=1e-5)
    (_, first), (second, other) = learned
    first.copy_from(other)
    frozen, _ = first.freeze()
    for norm in ("input_norm", "post_norm"):
        assert torch.equal(getattr(frozen.simulated, norm), getattr(second.simulated, norm))
        assert getattr(frozen.simulated, norm).std() > 0.05
    for role in LINEARS:
        assert torch.equal(frozen.weights[role].q, second.weights[role].q)
    assert bool(first.norm_gamma) is norms
    weights, scales, kv = first.materialize()
    block_forward(weights, decoder.shape, x, rope, kv, scales).square().sum().backward()
    for name, gamma in first.norm_gamma.items():
        assert gamma.grad.abs().max() > 0, name
