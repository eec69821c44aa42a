# SPDX-License-Identifier: Apache-2.0
"""Dynamic activations and K/V: schemes, search of the clips, checkpoints, the packed linear."""

import dataclasses

import prefixquant
import pytest
import torch
from prefixquant.calibrate import search_activation_scale, search_head_scales
from prefixquant.checkpoint import read_checkpoint
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.errors import CheckpointError, UserError
from prefixquant.loading import load_float_model
from prefixquant.modeling.linear import QuantLinear
from prefixquant.ops import pack_int4
from prefixquant.quantizer import fake_quantize_dynamic
from prefixquant.simulate import SimulatedModel
from prefixquant.workflow import Origin, Protocol, evaluate, quantize_and_save
from tiny_model import save_tiny_llama

TEXT = "Dynamic scales are made for every token; static ones are found once. " * 40


@pytest.mark.parametrize(
    ("text", "modes"),
    [
        ("w4a4kv4", ("static", "static")),
        ("w4a4dkv4d", ("dynamic", "dynamic")),
        ("w4a8dkv8", ("dynamic", "static")),
        ("w4a16kv4d", ("static", "dynamic")),
    ],
)
def test_schemes_name_their_modes(text, modes):
    scheme = Scheme.parse(text)
    assert (scheme.activation_mode, scheme.kv_mode) == modes
    assert str(scheme) == text


def test_what_is_not_quantized_is_not_dynamic():
    with pytest.raises(UserError, match="activation_mode"):
        Scheme.parse("w4a16dkv4")
    with pytest.raises(UserError, match="kv_mode"):
        Scheme(4, 4, 4, "static", "sometimes")


def test_the_clip_that_is_found_is_the_best_of_its_neighbours():
    x = torch.randn(300, 64) * torch.rand(300, 1) * 10
    x[:, 3] *= 6  # clipping one channel pays
    weight = torch.randn(16, 64)
    clip = search_activation_scale(x, [weight], 4, "dynamic")
    assert 0.2 < clip < 0.99

    def error(value):
        delta = fake_quantize_dynamic(x, torch.tensor(value), 4) - x
        return (delta @ weight.T).square().sum().item()

    found = error(clip.item())
    assert found <= 1.02 * min(error(clip.item() * f) for f in (0.8, 0.9, 1.1, 1.25))
    assert found < 0.9 * error(1.0)


def test_head_clips_are_at_most_one():
    x = torch.randn(3, 100, 16)
    clips = search_head_scales(x, torch.eye(16).expand(3, 16, 16), 4, "dynamic")
    assert clips.shape == (3,)
    assert (clips <= 1).all()
    assert (clips > 0.3).all()


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)])
def test_the_packed_linear_equals_fake_quantization(bits):
    weight_bits, activation_bits = bits
    q = torch.randint(-8, 8, (24, 32), dtype=torch.int8)
    scale, clip, bias = torch.rand(24) + 0.1, torch.tensor(0.9), torch.randn(24)
    linear = QuantLinear(
        pack_int4(q) if weight_bits == 4 else q,
        scale,
        clip,
        bias,
        activation_bits=activation_bits,
        compute_dtype=torch.float32,
        activation_mode="dynamic",
    )
    x = torch.randn(2, 5, 32) * torch.tensor([1.0, 0, 1e-3, 1e3, 7])[:, None]
    weight = q.double() * scale[:, None].double()
    expected = fake_quantize_dynamic(x, clip, activation_bits).double() @ weight.T + bias
    assert torch.allclose(linear(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_float_model(str(save_tiny_llama(tmp_path_factory.mktemp("m"))), torch.float32)


def make(model, scheme: str, folder, **changes):
    recipe = RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix="bos",
        nsamples=2,
        seqlen=32,
        search_samples=2,
        search_seqlen=32,
    )
    recipe = dataclasses.replace(recipe, **changes)
    tokens = model[1](TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    quantize_and_save(*model, recipe, tokens, folder, origin=Origin("tiny", "text"))
    return folder


def test_a_dynamic_checkpoint_holds_clips_and_runs_packed(model, tmp_path):
    folder = make(model, "w4a4dkv4", tmp_path / "q")
    checkpoint = read_checkpoint(folder)
    names = set(checkpoint.tensors)
    assert "model.layers.0.mlp.down_proj.input_clip" in names
    assert not any(name.endswith("input_scale") for name in names)
    assert "model.layers.0.self_attn.k_scale" in names
    ids = torch.randint(2, 200, (1, 24))
    packed = prefixquant.load(folder)(input_ids=ids).logits
    simulated = SimulatedModel(folder)(input_ids=ids).logits
    # A bfloat16 head, and levels that differ where a value lies between two of them: 0.031.
    assert (packed - simulated).norm() < 0.06 * simulated.norm()


def test_dynamic_kv_is_measured_by_simulation_only(model, tmp_path):
    folder = make(
        model,
        "w4a4dkv4d",
        tmp_path / "q",
        finetune=FinetuneConfig(epochs=1, samples=9, seqlen=32, validation_samples=1),
    )
    with pytest.raises(UserError, match="prefixquant eval"):
        prefixquant.load(folder)
    measured = evaluate(folder, TEXT, Protocol("text", tail=1.0, windows=2, seqlen=64))
    assert 1 < measured["ppl"] < 1000


def test_modes_of_a_checkpoint_are_checked(model, tmp_path):
    folder = make(model, "w4a4kv4", tmp_path / "q")
    config = (folder / "config.json").read_text()
    assert '"activation_mode": "static"' in config
    (folder / "config.json").write_text(
        config.replace('"activation_mode": "static"', '"activation_mode": "dynamic"')
    )
    with pytest.raises(CheckpointError, match=r"input_clip is missing"):
        read_checkpoint(folder)
    (folder / "config.json").write_text(
        config.replace('"activation_mode": "static"', '"activation_mode": 7')
    )
    with pytest.raises(CheckpointError, match="activation_mode"):
        read_checkpoint(folder)
