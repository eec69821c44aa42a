# SPDX-License-Identifier: Apache-2.0
"""Weights of 2, 3, 4 and 8 bits, groups and outliers in a checkpoint: bytes, checks, and running
them."""

import json
import re

import pytest
import torch
from prefixquant import ops
from prefixquant.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_checkpoint, write_checkpoint
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.errors import CheckpointError, UnsupportedModelError, UserError
from prefixquant.modeling import load
from prefixquant.modeling.linear import QuantLinear, SparseOutliers
from prefixquant.packing import pack_bits, pack_weight, unpack_bits, unpack_weight
from prefixquant.quantize import quantize
from prefixquant.quantizer import qrange
from prefixquant.simulate import SimulatedModel
from prefixquant.solvers import Outliers, QuantizedWeight
from prefixquant.workflow import hf_config_dict
from test_checkpoint import CONFIG, quantization, random_tensors, rewrite_weights
from tiny_families import tiny_family
from tiny_model import byte_tokenizer

Q = "model.layers.1.mlp.up_proj"


# ---------------------------------------------------------------------------- bytes


def test_bytes_of_3_and_2_bits():
    """docs/checkpoint-format.md gives these bytes."""
    q = torch.tensor([[0, 1, 2, 3, -4, -3, -2, -1]], dtype=torch.int8)
    assert bytes(pack_bits(q, 3)[0].tolist()) == b"\x88\xc6\xfa"
    q = torch.tensor([[0, 1, -2, -1]], dtype=torch.int8)
    assert bytes(pack_bits(q, 2)[0].tolist()) == b"\xe4"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pack_bits_is_a_little_endian_bit_string(bits):
    qmin, qmax = qrange(bits)
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(qmin, qmax + 1, (5, 72), generator=generator).to(torch.int8)
    packed = pack_bits(q, bits)
    assert packed.shape == (5, 72 * bits // 8)
    for row, fields in zip(packed.tolist(), q.tolist(), strict=True):
        number = int.from_bytes(bytes(row), "little")
        assert [number >> bits * k & (1 << bits) - 1 for k in range(72)] == [
            value & (1 << bits) - 1 for value in fields
        ]
    assert torch.equal(unpack_bits(packed, bits), q)
    assert torch.equal(unpack_bits(packed[:, None], bits), q[:, None])
    assert pack_bits(q[:0], bits).shape == (0, 72 * bits // 8)


def test_4_bits_are_packed_as_ever():
    q = torch.randint(-8, 8, (3, 10)).to(torch.int8)
    assert torch.equal(pack_bits(q, 4), ops.pack_int4(q))


def test_what_cannot_be_packed():
    q = torch.zeros(2, 12, dtype=torch.int8)
    with pytest.raises(ValueError, match="q expected a multiple of 8 columns at 3 bits, got 12"):
        pack_bits(q, 3)
    with pytest.raises(ValueError, match=r"q expected int8, got torch\.float32"):
        pack_bits(q.float(), 4)
    q[0, 0] = 2
    with pytest.raises(ValueError, match="q expected values from -2 to 1, got 0 to 2"):
        pack_bits(q, 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_round_trip(bits):
    q = torch.randint(*qrange(bits), (6, 24)).to(torch.int8)
    outliers = Outliers(torch.tensor([0, 77, 143]), torch.tensor([1.5, -2.25, 0.125]))
    solved = QuantizedWeight(q, torch.rand(6, 3) + 0.1, bits, outliers)
    tensors = {f"a.{part}": t for part, t in pack_weight(solved, torch.float16).items()}
    assert torch.equal(unpack_weight(tensors, "a", bits).dequantize(), solved.dequantize())


# ---------------------------------------------------------------------------- checkpoints


def config_with(**changes):
    return quantization(scheme=(3, 16, 16), **changes)


@pytest.fixture
def outlier_checkpoint(tmp_path):
    config = config_with(group_size=8, outlier_fraction=0.05)
    tensors = random_tensors(quant=config)
    return write_checkpoint(tmp_path / "ckpt", tensors, CONFIG, config)


def test_names_shapes_and_dtypes(outlier_checkpoint):
    tensors = read_checkpoint(outlier_checkpoint).tensors
    expected = {
        "weight_packed": ((16, 3), torch.uint8),
        "weight_scale": ((16, 1), torch.float32),
        "outlier_index": ((6,), torch.int32),
        "outlier_value": ((6,), torch.float16),
    }
    for part, (shape, dtype) in expected.items():
        tensor = tensors[f"{Q}.{part}"]
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    down = "model.layers.1.mlp.down_proj"
    assert tensors[f"{down}.weight_scale"].shape == (8, 2)


@pytest.mark.parametrize(
    "indices",
    [(0, 1, 2, 3, 4, 128), (-1, 0, 1, 2, 3, 4), (0, 1, 1, 2, 3, 4), (5, 4, 3, 2, 1, 0)],
)
def test_wrong_indices_are_refused(outlier_checkpoint, indices):
    def change(entries):
        data = torch.tensor(indices, dtype=torch.int32).numpy().tobytes()
        entries[f"{Q}.outlier_index"] = ("I32", (6,), data)

    rewrite_weights(outlier_checkpoint, change)
    message = f"{Q}.outlier_index expected ascending indices from 0 to 127"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_checkpoint(outlier_checkpoint)
    assert (outlier_checkpoint / WEIGHTS_NAME).exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("outlier_fraction", 0.6, "outlier_fraction: expected a number from 0 to 0.5, got 0.6"),
        ("outlier_fraction", "1", "outlier_fraction: expected a number from 0 to 0.5, got '1'"),
        ("outlier_fraction", 0.0, "outlier_.* does not belong"),
        ("outlier_fraction", 0.1, "expected shape"),
        ("group_size", -8, "group_size: expected an integer >= 0"),
        ("group_size", 8.0, "group_size: expected an integer >= 0"),
        ("group_size", 16, "group_size expected a divisor of the 8 input features of self_attn"),
        ("group_size", 4, "expected shape"),
        ("activation_bits", 8, "weight_bits 3 needs activation_bits 16"),
        ("weight_bits", 2, "expected shape"),
        ("weight_bits", 8, "expected dtype I8, got U8"),
    ],
)
def test_edited_options_are_refused(outlier_checkpoint, key, value, message):
    path = outlier_checkpoint / CONFIG_NAME
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(outlier_checkpoint)


# ---------------------------------------------------------------------------- running


def recipe(scheme, solver="rtn", **changes):
    return RecipeConfig(
        scheme=Scheme.parse(scheme),
        solver=solver,
        prefix="text:ab",
        nsamples=2,
        seqlen=32,
        search_samples=4,
        search_seqlen=32,
        **changes,
    )


CALIBRATION = torch.randint(0, 97, (400,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scheme", "solver", "options"),
    [
        ("w2a16kv16", "gptq", {}),
        ("w3a16kv16", "quantease", {}),
        ("w4a16kv16", "quantease", {"group_size": 16}),
        ("w3a16kv16", "quantease-outlier", {"outlier_fraction": 0.02, "group_size": 16}),
        ("w4a8kv8", "quantease-outlier", {"outlier_fraction": 0.02}),
        ("w4a4kv4", "quantease-outlier", {"outlier_fraction": 0.02}),
    ],
)
def test_loaded_model_equals_fake_quantization(scheme, solver, options, tmp_path, monkeypatch):
    monkeypatch.setattr("prefixquant.modeling.attention.matmul_dtype", lambda device: torch.float32)
    model = tiny_family("qwen2")  # with biases
    result = quantize(model, byte_tokenizer(), recipe(scheme, solver, **options), CALIBRATION)
    config = hf_config_dict(model, result.tensors)
    write_checkpoint(tmp_path / "q", result.tensors, config, result.quantization)
    # On few prompts (5 is one) a float sum in another order tips a level of 8 bits over a tie.
    prompt = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(4))
    actual = load(tmp_path / "q").model(prompt).last_hidden_state
    expected = SimulatedModel(tmp_path / "q").hidden(prompt)
    error = ((actual - expected).square().sum() / expected.square().sum()).item()
    assert error < (1e-3 if "a4" in scheme else 1e-8), error


def test_outliers_come_back_with_the_weight(tmp_path):
    """What the solver found is what is stored, but for 16 bits; without outliers it is worse."""
    model = tiny_family("llama")
    errors = {}
    for solver in ("quantease", "quantease-outlier"):
        asked = recipe("w3a16kv16", solver, outlier_fraction=0.05)
        result = quantize(model, byte_tokenizer(), asked, CALIBRATION)
        errors[solver] = [
            e for block in result.report["blocks"] for e in block["weight_errors"].values()
        ]
    index = result.tensors["model.layers.0.mlp.up_proj.outlier_index"]
    assert index.dtype == torch.int32
    assert len(index) == int(0.05 * 80 * 48)
    assert result.quantization.outlier_fraction == 0.05
    pairs = zip(errors["quantease-outlier"], errors["quantease"], strict=True)
    assert all(fewer < more for fewer, more in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outliers_beside_an_integer_product(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (10, 64), generator=generator).to(torch.int8)
    x = torch.randint(-128, 128, (2, 3, 64), generator=generator).to(torch.int8)
    index = torch.tensor([3, 64, 65, 639])
    value = torch.tensor([4.0, -8.0, 2.0, 16.0], dtype=torch.float16)
    scales = torch.full((10,), 0.5), torch.tensor(0.25)
    arguments = {"activation_bits": 8, "compute_dtype": dtype}
    plain = QuantLinear(pack_bits(q, 4), *scales, None, **arguments)
    linear = QuantLinear(
        pack_bits(q, 4),
        *scales,
        None,
        outliers=SparseOutliers(index, value, (10, 64)),
        **arguments,
    )
    weight = q.double() * 0.5
    weight.view(-1)[index] += value.double()
    expected = (x.double() * 0.25) @ weight.T
    assert linear(x).dtype == dtype
    rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    error = (linear(x).double() - expected).abs()
    assert (error <= 2 * rounding * expected.abs().amax()).all()
    assert (plain(x).double() - expected).abs().max() > 100
    moved = linear.to(torch.bfloat16)
    assert moved.outliers.value.dtype == torch.float16
    assert moved.outliers.index.dtype == torch.int64


def test_options_that_cannot_be_are_refused_before_the_work():
    model, tokenizer = tiny_family("llama"), byte_tokenizer()
    with pytest.raises(UserError, match="group_size: expected a divisor of 80 input features"):
        quantize(model, tokenizer, recipe("w4a16kv16", group_size=48), CALIBRATION)
    with pytest.raises(UserError, match="groups are weight-only, expected activation_bits 16"):
        recipe("w4a8kv8", group_size=16)
    odd = tiny_family("llama", intermediate_size=84)
    with pytest.raises(UnsupportedModelError, match="3-bit weights: expected a multiple of 8"):
        quantize(odd, tokenizer, recipe("w3a16kv16"), CALIBRATION)
