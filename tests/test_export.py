# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors view: its integers, its values, and stock transformers running it."""

import json

import pytest
import torch
from prefixquant import export
from prefixquant.block import BlockScales
from prefixquant.checkpoint import read_checkpoint
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.errors import UserError
from prefixquant.export import export_compressed_tensors, pack_int32, without_hadamard
from prefixquant.hadamard import apply_hadamard, hadamard_matrix
from prefixquant.packing import unpack_weight
from prefixquant.quantize import quantize
from prefixquant.roles import model_roles
from prefixquant.simulate import SimulatedModel
from prefixquant.workflow import hf_config_dict, write_checkpoint
from safetensors.torch import load_file
from test_cli import assert_one_line_error, run
from tiny_families import tiny_family
from tiny_model import byte_tokenizer

CALIBRATION = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 2}


def save(folder, family="llama", scheme="w4a16kv16", prefix="text:ab", **changes):
    model = tiny_family(family, **SIZES)
    recipe = RecipeConfig(
        scheme=Scheme.parse(scheme),
        prefix=prefix,
        nsamples=2,
        seqlen=32,
        search_samples=2,
        search_seqlen=32,
        **changes,
    )
    result = quantize(model, byte_tokenizer(), recipe, CALIBRATION)
    config = hf_config_dict(model, result.tensors)
    write_checkpoint(
        folder, result.tensors, config, result.quantization, tokenizer=byte_tokenizer()
    )
    return folder


def dequantized(folder):
    """name -> float32 weight as a user of the format would compute it, from the bytes alone."""
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name, shape in tensors.items():
        if not name.endswith("weight_shape"):
            continue
        linear = name.removesuffix(".weight_shape")
        words = tensors[f"{linear}.weight_packed"].long() & 0xFFFFFFFF
        bits = 32 * words.shape[1] // shape[1].item()
        fields = (words[..., None] >> (bits * torch.arange(32 // bits))) & ((1 << bits) - 1)
        q = (fields.flatten(1)[:, : shape[1]] - (1 << (bits - 1))).float()
        scale = tensors[f"{linear}.weight_scale"].float()
        weights[linear] = q * scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
    return weights


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 37), dtype=torch.int8)
    words = pack_int32(q, bits)
    per_word = 32 // bits
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-37 // per_word))
    for row in range(5):
        for column in range(37):
            word = words[row, column // per_word].item() & 0xFFFFFFFF
            field = word >> (bits * (column % per_word)) & ((1 << bits) - 1)
            assert field - (1 << (bits - 1)) == q[row, column]


@pytest.mark.parametrize("size", [1, 8, 12, 80, 256])
def test_taking_a_hadamard_out(size):
    weight = torch.randn(3, 2 * size)
    back = without_hadamard(apply_hadamard(weight, size) if size > 1 else weight, size)
    torch.testing.assert_close(back, weight, rtol=0, atol=1e-5)
    if size > 1:
        blocks = weight.unflatten(1, (2, size)) @ hadamard_matrix(size, torch.float32)
        torch.testing.assert_close(without_hadamard(weight, size), blocks.flatten(1))


BEHIND_NORMS = [f"{role}_proj" for role in ("q", "k", "v", "gate", "up")]


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w4a4kv4 r1", "w8a8kv8", "w4a16kv16 grouped"])
@pytest.mark.parametrize("down_proj", export.DOWN_PROJ)
def test_the_view_holds_the_integers_of_the_checkpoint(tmp_path, scheme, down_proj):
    name, *more = scheme.split()
    changes = {"grouped": {"group_size": 32}, "r1": {"r6": False}}.get("".join(more), {})
    folder = save(tmp_path / "q", scheme=name, **changes)
    report = export_compressed_tensors(folder, tmp_path / "view", down_proj=down_proj)
    checkpoint = read_checkpoint(folder)
    online = {"down_proj": 256} | ({"o_proj": 64} if name == "w4a4kv4" else {})
    online |= dict.fromkeys(BEHIND_NORMS, 64) if scheme == "w4a4kv4" else {}  # R6
    weights = dequantized(tmp_path / "view")
    tensors = load_file(tmp_path / "view" / "model.safetensors")
    assert len(weights) == 2 * (7 if down_proj == "int4" else 7 - len(online))
    for index in range(2):
        for path in model_roles(checkpoint.hf_config()).linears.values():
            linear, short = f"model.layers.{index}.{path}", path.split(".")[1]
            source = unpack_weight(checkpoint.tensors, linear, checkpoint.quantization.weight_bits)
            plain = without_hadamard(source.dequantize(), online.get(short, 1))
            if short in online and down_proj == "16bit":
                found = tensors[f"{linear}.weight"].float()
                torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)
            elif short in online:  # rounded again
                error = ((weights[linear] - plain).square().sum() / plain.square().sum()).item()
                assert error < (1e-4 if name.startswith("w8") else 2e-2)
            else:  # the scales are stored in 16 bits
                torch.testing.assert_close(weights[linear], plain, rtol=1e-3, atol=1e-6)
    for short in ("down_proj", "o_proj", *BEHIND_NORMS):
        rounded = short in online and down_proj == "int4"
        assert len(report[f"{short}_relative_error"]) == (2 if rounded else 0)
    assert not any("prefix" in n or "input_scale" in n or "k_scale" in n for n in tensors)


@pytest.mark.parametrize(
    ("family", "scheme", "down_proj"),
    [
        ("llama", "w4a4kv4", "int4"),
        ("qwen3", "w4a4kv4", "16bit"),
        ("qwen2", "w8a16kv16", "int4"),
    ],
)
def test_stock_transformers_runs_it(tmp_path, family, scheme, down_proj):
    """Loaded by AutoModelForCausalLM through the compressed-tensors package, it is the model whose
    weights the view holds."""
    pytest.importorskip("compressed_tensors", reason="the [export] extra is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    centred = family == "llama"  # the one that has places for the biases
    folder = save(tmp_path / "q", family, scheme, centre=centred)
    export_compressed_tensors(folder, tmp_path / "view", down_proj=down_proj)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "view", dtype=torch.float32)
    biases = {"attention_bias": True, "mlp_bias": True} if centred else {}
    plain = tiny_family(family, **SIZES, tie_word_embeddings=False, **biases)
    tensors = load_file(tmp_path / "view" / "model.safetensors")
    state = {n: t.float() for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    state |= {f"{n}.weight": w for n, w in dequantized(tmp_path / "view").items()}
    plain.load_state_dict(state)
    prompt = torch.randint(0, 97, (2, 9))
    expected = plain(prompt).logits
    error = (model(prompt).logits - expected).square().sum() / expected.square().sum()
    assert error < 1e-9
    if scheme == "w8a16kv16":  # and that is near the float model it was made of
        true = tiny_family(family, **SIZES)(prompt).logits
        assert (expected - true).square().sum() / true.square().sum() < 5e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "view")("ab")["input_ids"]


@pytest.mark.parametrize("r6", [False, True])
def test_a_16_bit_view_is_the_checkpoint_without_its_rotations(tmp_path, r6):
    """A stock model with these weights, norms and biases gives what the checkpoint gives while its
    activations and K/V are not quantized, and no prefix is in front."""
    folder = save(tmp_path / "q", scheme="w4a4kv4", prefix="none", r6=r6)
    export_compressed_tensors(folder, tmp_path / "view", down_proj="16bit")
    checkpoint, tensors = read_checkpoint(folder), load_file(tmp_path / "view/model.safetensors")
    assert checkpoint.quantization.rotations.r6 is r6
    card = (tmp_path / "view/README.md").read_text(encoding="utf-8")
    assert f"# A {'16-bit' if r6 else 'W4A16'} view" in card
    assert f"Weights of {'16' if r6 else '4'} bits" in card
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(tensors[norm], checkpoint.tensors[norm])
    assert (tensors[norm].float().std() > 0.05) == r6
    state = {n: t.float() for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    state |= {f"{n}.weight": w for n, w in dequantized(tmp_path / "view").items()}
    biases = {"attention_bias": True, "mlp_bias": True}
    plain = tiny_family("llama", **SIZES, tie_word_embeddings=False, **biases)
    plain.load_state_dict(state)
    simulated, ids = SimulatedModel(folder), torch.randint(0, 97, (2, 9))
    simulated.blocks = [(block, prefix, BlockScales()) for block, prefix, _ in simulated.blocks]
    expected = simulated(ids).logits
    error = (plain(ids).logits - expected).square().sum() / expected.square().sum()
    assert error < 1e-5  # of storage in 16 bits


def test_what_is_subtracted_moves_into_the_biases(tmp_path):
    """The view's linears give on x what the checkpoint's give on x less its shift."""
    folder = save(tmp_path / "q", scheme="w8a8kv8")
    export_compressed_tensors(folder, tmp_path / "view", down_proj="16bit")
    checkpoint, view = read_checkpoint(folder), load_file(tmp_path / "view" / "model.safetensors")
    config = json.loads((tmp_path / "view" / "config.json").read_text())
    assert config["attention_bias"] is config["mlp_bias"] is True
    weights, x = dequantized(tmp_path / "view"), torch.randn(64)
    for name, point in (("self_attn.k_proj", "self_attn"), ("mlp.up_proj", "mlp")):
        linear = f"model.layers.1.{name}"
        shift = checkpoint.tensors[f"model.layers.1.{point}.input_shift"].float()
        assert shift.norm() > 0.1
        actual = weights[linear] @ x + view[f"{linear}.bias"].float()
        expected = weights[linear] @ (x - shift) + checkpoint.tensors[f"{linear}.bias"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_family_without_places_for_biases_is_refused(tmp_path, family):
    folder = save(tmp_path / "q", family, "w4a4kv4")
    with pytest.raises(UserError, match=f"format of a {family} has no place.*centre: false"):
        export_compressed_tensors(folder, tmp_path / "view")
    assert not (tmp_path / "view").exists()
    plain = save(tmp_path / "plain", family, "w4a4kv4", centre=False)
    export_compressed_tensors(plain, tmp_path / "view")


def test_the_package_packs_alike():
    pytest.importorskip("compressed_tensors", reason="the [export] extra is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits in (4, 8):
        q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (6, 64), dtype=torch.int8)
        assert torch.equal(pack_int32(q, bits), pack_to_int32(q, bits))


def test_command(tmp_path):
    folder = save(tmp_path / "q", scheme="w4a4kv4")
    result = run("export", folder, "-o", tmp_path / "view", "--json")
    assert result.exit_code == 0, result.stderr
    assert "w4a16kv16 checkpoint makes a better view" in result.stderr
    report = json.loads(result.stdout)
    assert report["down_proj"] == "int4"
    config = json.loads((tmp_path / "view" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "auto_map" not in config
    text = run("export", folder, "-o", tmp_path / "other", "--down-proj", "16bit").stdout
    assert "down_proj" in text
    assert_one_line_error(run("export", folder, "-o", tmp_path / "view"), "not empty")
    assert_one_line_error(
        run("export", folder, "-o", tmp_path / "x", "--down-proj", "3"), "down_proj", "'3'"
    )
    assert_one_line_error(run("export", tmp_path, "-o", tmp_path / "x"), "config.json")
    assert_one_line_error(
        run("export", folder, "-o", tmp_path / "x", "--format", "gguf"), "--format", "'gguf'"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "q", "view"]


def test_what_has_no_view(tmp_path):
    folder = save(tmp_path / "q", scheme="w3a16kv16")
    with pytest.raises(UserError, match="weights of 4 or 8 bits, got 3"):
        export_compressed_tensors(folder, tmp_path / "view")
