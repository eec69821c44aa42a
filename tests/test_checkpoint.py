# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the bytes on disk, the round trip, and every way a damaged one must be refused."""

import contextlib
import dataclasses
import json
import math
import os
import struct

import pytest
import torch
from prefixquant.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    check_output_folder,
    read_checkpoint,
    write_checkpoint,
)
from prefixquant.checkpoint_layout import ModelSizes, expected_tensors
from prefixquant.config import QuantizationConfig, Rotations
from prefixquant.errors import CheckpointError, UserError

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 11,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
}


def quantization(scheme=(4, 4, 4), prefix=(1,), **changes):
    return QuantizationConfig(
        weight_bits=scheme[0],
        activation_bits=scheme[1],
        kv_bits=scheme[2],
        rotations=Rotations(r4_block_size=16),
        prefix_token_ids=tuple(prefix),
        prefix_text=tuple(str(t) for t in prefix),
        prefix_mode="verified",
        solver="rtn",
        producer="test",
        **changes,
    )


def random_tensors(config=CONFIG, quant=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtypes = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32, "F16": torch.float16}
    tensors = {}
    specs = expected_tensors(ModelSizes.from_config(config), quant or quantization())
    for name, spec in specs.items():
        if spec.below:
            tensors[name] = torch.arange(spec.shape[0], dtype=torch.int32) * 2
            continue
        dtype = dtypes[spec.dtypes[0]]
        if dtype.is_floating_point:
            tensors[name] = (torch.rand(spec.shape, generator=generator) + 0.1).to(dtype)
        else:
            low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
            tensors[name] = torch.randint(low, high, spec.shape, generator=generator).to(dtype)
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", random_tensors(), CONFIG, quantization())


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    for key, value in changes.items():
        target = config
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(config))


def raw_safetensors(entries):
    """The bytes of a safetensors file, built by hand: name -> (dtype, shape, data)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def rewrite_weights(folder, change):
    """Passes the tensors through ``change`` as name -> (dtype, shape, bytes), writes them back."""
    names = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.float16: "F16"}
    names[torch.int32] = "I32"
    entries = {}
    for name, tensor in read_checkpoint(folder).tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = (names[tensor.dtype], tuple(tensor.shape), data)
    change(entries)
    (folder / WEIGHTS_NAME).write_bytes(raw_safetensors(entries))


# ---------------------------------------------------------------------------- the format


def test_bytes_of_a_packed_weight(tmp_path):
    """Low nibble = even index, two's complement, rows one after the other, little-endian scales."""
    tensors = random_tensors()
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    tensors[name][0] = torch.tensor([0x10, 0x32, 0xFE, 0x78], dtype=torch.uint8)
    tensors["model.layers.0.self_attn.q_proj.weight_scale"][:] = 0.5
    folder = write_checkpoint(tmp_path / "c", tensors, CONFIG, quantization())

    content = (folder / WEIGHTS_NAME).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    entry = header[name]
    assert entry["dtype"] == "U8"
    assert entry["shape"] == [8, 4]
    start = 8 + length + entry["data_offsets"][0]
    assert content[start : start + 4] == b"\x10\x32\xfe\x78"
    values = [
        (nibble ^ 8) - 8 for byte in content[start : start + 4] for nibble in (byte & 15, byte >> 4)
    ]
    assert values == [0, 1, 2, 3, -2, -1, -8, 7]
    entry = header["model.layers.0.self_attn.q_proj.weight_scale"]
    assert (entry["dtype"], entry["shape"]) == ("F32", [8])
    start = 8 + length + entry["data_offsets"][0]
    assert content[start : start + 4] == b"\x00\x00\x00\x3f"


def test_reader_takes_a_file_written_by_hand(checkpoint):
    """The format is what the bytes say, not what our writer happens to do (order, no metadata)."""
    before = {name: t.clone() for name, t in read_checkpoint(checkpoint).tensors.items()}

    def reverse(entries):
        items = list(entries.items())[::-1]
        entries.clear()
        entries.update(items)

    rewrite_weights(checkpoint, reverse)
    after = read_checkpoint(checkpoint)
    assert all(torch.equal(after.tensors[name], before[name]) for name in before)


def test_expected_names_of_a_layer():
    specs = expected_tensors(ModelSizes.from_config(CONFIG), quantization())
    layer = {
        n[len("model.layers.1.") :]: s for n, s in specs.items() if n.startswith("model.layers.1.")
    }
    shapes = {name: spec.shape for name, spec in layer.items()}
    assert shapes == {
        "self_attn.q_proj.weight_packed": (8, 4),
        "self_attn.q_proj.weight_scale": (8,),
        "self_attn.k_proj.weight_packed": (4, 4),
        "self_attn.k_proj.weight_scale": (4,),
        "self_attn.v_proj.weight_packed": (4, 4),
        "self_attn.v_proj.weight_scale": (4,),
        "self_attn.o_proj.weight_packed": (8, 4),
        "self_attn.o_proj.weight_scale": (8,),
        "mlp.gate_proj.weight_packed": (16, 4),
        "mlp.gate_proj.weight_scale": (16,),
        "mlp.up_proj.weight_packed": (16, 4),
        "mlp.up_proj.weight_scale": (16,),
        "mlp.down_proj.weight_packed": (8, 8),
        "mlp.down_proj.weight_scale": (8,),
        "self_attn.input_scale": (),
        "self_attn.o_proj.input_scale": (),
        "mlp.input_scale": (),
        "mlp.down_proj.input_scale": (),
        "self_attn.k_scale": (1,),
        "self_attn.v_scale": (1,),
        "self_attn.prefix_key": (1, 1, 4),
        "self_attn.prefix_value": (1, 1, 4),
        "input_layernorm.weight": (8,),
        "post_attention_layernorm.weight": (8,),
    }
    assert len(specs) == 2 * len(layer) + 3


@pytest.mark.parametrize(
    ("model_type", "flags", "biased"),
    [
        ("llama", {}, ""),
        ("llama", {"attention_bias": True}, "qkvo"),
        ("llama", {"mlp_bias": True}, "gate up down"),
        ("mistral", {"attention_bias": True}, ""),
        ("qwen2", {}, "qkv"),
        ("qwen3", {}, ""),
        ("qwen3", {"attention_bias": True}, "qkvo"),
    ],
)
def test_biases_and_norms_of_each_family(model_type, flags, biased):
    config = {**CONFIG, "attention_bias": False, "model_type": model_type, **flags}
    specs = expected_tensors(ModelSizes.from_config(config), quantization())
    found = {
        n.split(".")[4][:-5]
        for n in specs
        if n.startswith("model.layers.0.") and n.endswith("bias")
    }
    assert found == set(biased.split() if " " in biased else biased)
    assert ("model.layers.0.self_attn.q_norm.weight" in specs) == (model_type == "qwen3")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_centred_checkpoint_has_shifts_and_all_biases(model_type):
    config = {**CONFIG, "model_type": model_type}
    plain = expected_tensors(ModelSizes.from_config(config), quantization())
    specs = expected_tensors(ModelSizes.from_config(config), quantization(centred=True))
    layer = "model.layers.1."
    assert plain.items() <= specs.items()
    added = {n.removeprefix(layer): s.shape for n, s in specs.items() - plain.items() if layer in n}
    rows = {"self_attn": {"q": 8, "k": 4, "v": 4, "o": 8}, "mlp": {"gate": 16, "up": 16, "down": 8}}
    expected = {"self_attn.input_shift": (8,), "mlp.input_shift": (8,)}
    for part, linears in rows.items():
        for role, n in linears.items():
            if not (model_type == "qwen2" and role in "qkv"):
                expected[f"{part}.{role}_proj.bias"] = (n,)
    assert added == expected
    assert specs[f"{layer}mlp.input_shift"].dtypes == ("F16", "BF16")
    keys = expected_tensors(ModelSizes.from_config(config), quantization(centred_keys=True))
    shift = f"{layer}self_attn.k_shift"
    assert {n for n in keys.keys() - plain.keys() if layer in n} == {shift}
    assert (keys[shift].shape, keys[shift].dtypes) == ((1, 4), ("F32",))


@pytest.mark.parametrize("scheme", [(4, 4, 4), (4, 8, 8), (8, 8, 16), (4, 16, 16)])
@pytest.mark.parametrize("prefix", [(), (1,), (5, 7, 1)])
def test_round_trip(tmp_path, scheme, prefix):
    quant = quantization(scheme, prefix)
    tensors = random_tensors(quant=quant)
    folder = write_checkpoint(tmp_path / "c", tensors, CONFIG, quant, extra_files={"a.txt": "x"})
    back = read_checkpoint(folder)
    assert back.quantization == quant
    assert back.config["hidden_size"] == 8
    assert "quantization_config" not in back.config
    assert set(back.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)
    assert (folder / "a.txt").read_text() == "x"
    assert (folder / "README.md").read_text().startswith("---\n")
    assert back.hf_config().num_hidden_layers == 2


def test_a_checkpoint_from_before_r6_has_none(checkpoint):
    """Its rotations have no such key, nor those of R5."""
    config = json.loads((checkpoint / CONFIG_NAME).read_text())
    rotations = config["quantization_config"]["rotations"]
    for key in ("r5", "r5_block_size", "r6"):
        del rotations[key]
    (checkpoint / CONFIG_NAME).write_text(json.dumps(config))
    back = read_checkpoint(checkpoint).quantization
    assert back == quantization()
    assert back.rotations.r1
    assert not back.rotations.r6


@pytest.mark.parametrize("hidden", [8, 116])
def test_r6_is_read_where_the_hidden_size_has_a_hadamard_matrix(tmp_path, hidden):
    quant = dataclasses.replace(
        quantization(), rotations=Rotations(r1=False, r4_block_size=16, r6=True)
    )
    config = {**CONFIG, "hidden_size": hidden}
    tensors = random_tensors(config, quant)
    if hidden == 116:  # 4 * 29
        with pytest.raises(CheckpointError, match="r6 of hidden_size: size 116 has no Hadamard"):
            write_checkpoint(tmp_path / "c", tensors, config, quant)
        return
    back = read_checkpoint(write_checkpoint(tmp_path / "c", tensors, config, quant))
    assert back.quantization == quant
    assert back.quantization.to_dict()["rotations"]["r6"] is True


def test_shards_and_index(tmp_path):
    tensors = random_tensors()
    folder = write_checkpoint(tmp_path / "c", tensors, CONFIG, quantization(), max_shard_bytes=400)
    index = json.loads((folder / INDEX_NAME).read_text())
    assert len(set(index["weight_map"].values())) > 2
    back = read_checkpoint(folder)
    assert all(torch.equal(back.tensors[name], tensors[name]) for name in tensors)


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_permissions_are_those_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_checkpoint(tmp_path / "q", random_tensors(), CONFIG, quantization())
    finally:
        os.umask(before)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in (tmp_path / "q").iterdir()}
    assert WEIGHTS_NAME in modes
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert (tmp_path / "q").stat().st_mode & 0o777 == 0o777 & ~umask


def test_output_folder_rules(tmp_path, checkpoint):
    tensors = random_tensors(seed=1)
    with pytest.raises(UserError, match="not empty"):
        write_checkpoint(checkpoint, tensors, CONFIG, quantization())
    write_checkpoint(checkpoint, tensors, CONFIG, quantization(), overwrite=True)
    assert torch.equal(
        read_checkpoint(checkpoint).tensors["lm_head.weight"], tensors["lm_head.weight"]
    )
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="only a prefixquant checkpoint is overwritten"):
        write_checkpoint(foreign, tensors, CONFIG, quantization(), overwrite=True)
    assert (foreign / "thesis.tex").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    write_checkpoint(empty, tensors, CONFIG, quantization())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder"):
        check_output_folder(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "empty", "file", "foreign"]


def test_an_interrupted_write_leaves_nothing(tmp_path, checkpoint):
    class Failing:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    before = (checkpoint / WEIGHTS_NAME).read_bytes()
    for target, overwrite in ((tmp_path / "new", False), (checkpoint, True)):
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(
                target,
                random_tensors(seed=2),
                CONFIG,
                quantization(),
                tokenizer=Failing(),
                overwrite=overwrite,
            )
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    assert (checkpoint / WEIGHTS_NAME).read_bytes() == before


def test_a_failed_rename_brings_the_old_checkpoint_back(tmp_path, checkpoint, monkeypatch):
    before = (checkpoint / WEIGHTS_NAME).read_bytes()
    rename = os.rename

    def fail_for_partial(source, target):
        if str(source).endswith(".partial"):
            raise OSError("disk on fire")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_partial)
    with pytest.raises(OSError, match="disk on fire"):
        write_checkpoint(checkpoint, random_tensors(seed=2), CONFIG, quantization(), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    assert (checkpoint / WEIGHTS_NAME).read_bytes() == before


def test_writer_refuses_wrong_tensors(tmp_path):
    for change, message in (
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra' does not belong"),
        (lambda t: t.update({"model.norm.weight": torch.ones(8)}), "expected dtype F16 or BF16"),
        (lambda t: t.update({"model.norm.weight": torch.ones(9).half()}), r"expected shape \[8\]"),
    ):
        tensors = random_tensors()
        change(tensors)
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / "c", tensors, CONFIG, quantization())
    for name in ("../x", "config.json", "/x", ""):
        with pytest.raises(UserError, match="plain file name"):
            write_checkpoint(
                tmp_path / "c", random_tensors(), CONFIG, quantization(), extra_files={name: ""}
            )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- reading damage


def test_truncation_anywhere_is_refused(checkpoint):
    """Every length from an empty file to one byte short, in steps that hit all the parts."""
    path = checkpoint / WEIGHTS_NAME
    content = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    cuts = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(content) - 1}
    cuts.update(range(0, len(content), len(content) // 37))
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
            read_checkpoint(checkpoint)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="truncated or padded"):
        read_checkpoint(checkpoint)


def test_every_flipped_header_byte_is_refused_or_harmless(checkpoint):
    """No edit of the header may crash, hang, or hand out other tensors than the config implies."""
    path = checkpoint / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    names = set(read_checkpoint(checkpoint).tensors)
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for position in [*range(8), *range(8, header_end, 29)]:
        damaged = bytearray(content)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            assert set(read_checkpoint(checkpoint).tensors) == names


Q = "model.layers.0.self_attn.q_proj.weight_packed"
SCALE = "model.layers.1.mlp.down_proj.weight_scale"
INPUT = "model.layers.0.mlp.input_scale"
PREFIX = "model.layers.0.self_attn.prefix_key"


def set_scale(value):
    def change(entries):
        dtype, shape, data = entries[SCALE]
        entries[SCALE] = (dtype, shape, struct.pack("<f", value) + data[4:])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop(Q), f"{Q} is missing"),
        (lambda e: e.update(evil=("U8", (1,), b"x")), "evil' does not belong"),
        (lambda e: e.update({"x" * 9999: ("U8", (1,), b"x")}), r"xxx\.\.\. does not belong"),
        (lambda e: e.update({Q: ("I8", *e[Q][1:])}), f"{Q} expected dtype U8, got I8"),
        (lambda e: e.update({SCALE: ("I32", *e[SCALE][1:])}), f"{SCALE} expected dtype F32"),
        (lambda e: e.update({Q: ("U8", (4, 8), e[Q][2])}), rf"{Q} expected shape \[8, 4\]"),
        (lambda e: e.update({Q: ("U8", (32,), e[Q][2])}), rf"{Q} expected shape \[8, 4\]"),
        (lambda e: e.update({INPUT: ("F32", (1,), e[INPUT][2])}), rf"{INPUT} expected shape \[\]"),
        (lambda e: e.update({Q: ("U8", (8, 5), e[Q][2])}), "not a valid safetensors file"),
        (lambda e: e.update({Q: ("U8", (8, -4), e[Q][2])}), "not a valid safetensors file"),
        (lambda e: e.update({Q: ("U8", (2**62, 4), e[Q][2])}), "not a valid safetensors file"),
        (lambda e: e.update({Q: ("NOPE", (8, 4), e[Q][2])}), "not a valid safetensors file"),
        (set_scale(math.nan), f"{SCALE} expected finite values"),
        (set_scale(math.inf), f"{SCALE} expected finite values"),
        (set_scale(0.0), f"{SCALE} expected scales above zero, got 0"),
        (set_scale(-1.0), f"{SCALE} expected scales above zero, got -1"),
        (
            lambda e: e.update({PREFIX: (*e[PREFIX][:2], b"\x00\x7e" * 4)}),
            f"{PREFIX} expected finite values",
        ),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, message):
    rewrite_weights(checkpoint, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\xff" * 8, "truncated or not a safetensors"),
        (struct.pack("<Q", 2) + b"{}", "model.embed_tokens.weight is missing"),
        (struct.pack("<Q", 2) + b"[]", "not a valid safetensors file"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not valid JSON"),
        (struct.pack("<Q", 5) + b"{'a':", "not valid JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
        (b"PK\x03\x04 a pickled zip, never opened as one", "truncated or not a safetensors"),
    ],
)
def test_garbage_weights(checkpoint, content, message):
    (checkpoint / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_config__format_version", 2, "format_version expected 1, got 2"),
        ("quantization_config__format_version", "1", "format_version expected 1, got '1'"),
        ("quantization_config__format_version", 1.0, "format_version expected an integer"),
        ("quantization_config__quant_method", "gptq", "quant_method expected 'prefixquant'"),
        ("quantization_config__surprise", 1, "unknown key 'surprise'"),
        ("quantization_config__weight_bits", 5, "weight_bits expected one of 2, 3, 4, 8"),
        ("quantization_config__weight_bits", 3, "weight_bits 3 needs activation_bits 16"),
        ("quantization_config__weight_bits", 8, "8-bit weights with 4-bit activations"),
        ("quantization_config__weight_bits", 4.0, "weight_bits expected an integer"),
        ("quantization_config__weight_bits", [4], "weight_bits"),
        ("quantization_config__kv_bits", 16, "k_scale' does not belong"),
        ("quantization_config__centred", True, "bias is missing"),
        ("quantization_config__centred", 1, "centred expected true"),
        ("quantization_config__centred", "no", "centred expected true"),
        ("quantization_config__companded", 1, "companded expected true"),
        ("quantization_config__companded", "yes", "companded expected true"),
        ("quantization_config__activation_bits", 16, "input_scale' does not belong"),
        ("quantization_config__rotations", 7, "rotations expected an object"),
        ("quantization_config__rotations__r4_block_size", 5, "r4_block_size expected a divisor"),
        ("quantization_config__rotations__r3", "yes", "r3 expected true or false"),
        ("quantization_config__rotations__r5", 1, "r5 expected true or false"),
        ("quantization_config__rotations__r5", True, "r5_block_size expected a divisor"),
        ("quantization_config__rotations__r5_block_size", -1, "r5_block_size expected an integer"),
        ("quantization_config__rotations__r6", True, "r6 takes the place of r1"),
        ("quantization_config__rotations__r6", 0, "r6 expected true or false"),
        ("quantization_config__rotations__r6_size", 8, "unknown key 'r6_size'"),
        ("quantization_config__prefix_token_ids", [99], "expected ids below vocab_size 11"),
        ("quantization_config__prefix_token_ids", [-1], "expected integers >= 0"),
        ("quantization_config__prefix_token_ids", [[1]], "expected integers >= 0"),
        ("quantization_config__prefix_token_ids", "1", "prefix_token_ids expected a list"),
        ("quantization_config__prefix_token_ids", [], "one text per prefix token"),
        ("quantization_config__prefix_text", [3], r"prefix_text\[0\] expected text"),
        ("quantization_config__solver", {"a": 1}, "solver expected text"),
        ("quantization_config", None, "not a prefixquant checkpoint"),
        ("quantization_config", [1], "not a prefixquant checkpoint"),
        ("hidden_size", -8, "hidden_size expected an integer from 1"),
        ("hidden_size", 10**30, "hidden_size expected an integer from 1"),
        ("hidden_size", "8", "hidden_size expected an integer from 1"),
        ("hidden_size", True, "hidden_size expected an integer from 1"),
        ("hidden_size", 8.0, "hidden_size expected an integer from 1"),
        ("hidden_size", None, "hidden_size expected an integer from 1"),
        ("hidden_size", 16, r"expected shape \[11, 16\], got \[11, 8\]"),
        ("hidden_size", 9, "a multiple of 2 to pack 4 bits"),
        ("num_hidden_layers", 10**9, "num_hidden_layers expected an integer"),
        ("num_hidden_layers", 3, r"layers\.2\..* is missing"),
        ("num_hidden_layers", 1, r"layers\.1\..* does not belong"),
        ("num_key_value_heads", 0, "num_key_value_heads expected an integer"),
        ("num_attention_heads", 3, "head_dim|shape"),
        ("head_dim", 0, "head_dim expected an integer"),
        ("vocab_size", 12, r"expected shape \[12, 8\]"),
        ("model_type", "gpt2", "model_type expected llama, mistral, qwen2 or qwen3"),
        ("model_type", ["llama"], "model_type expected"),
        ("model_type", "qwen3", "q_norm.weight is missing"),
        ("attention_bias", 1, "attention_bias expected true or false"),
        ("attention_bias", True, "bias is missing"),
        ("tie_word_embeddings", True, "tie_word_embeddings expected false"),
        ("rms_norm_eps", "tiny", "rms_norm_eps expected a number"),
        ("rms_norm_eps", math.nan, "rms_norm_eps expected a number"),
        ("rms_norm_eps", -1.0, "rms_norm_eps expected a number"),
    ],
)
def test_edited_config_is_refused(checkpoint, key, value, message):
    edit_config(checkpoint, **{key: value})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object"),
        (b"\xff\xff", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_garbage_config(checkpoint, content, message):
    (checkpoint / CONFIG_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(checkpoint)


def test_values_that_transformers_refuses(checkpoint):
    edit_config(checkpoint, rope_parameters="round and round")
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_checkpoint(checkpoint).hf_config()
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        read_checkpoint(tmp_path / "nowhere")
    (checkpoint / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        read_checkpoint(checkpoint)
    (checkpoint / CONFIG_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_checkpoint(checkpoint)


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(
        tmp_path / "sharded", random_tensors(), CONFIG, quantization(), max_shard_bytes=400
    )


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file"):
        read_checkpoint(sharded)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b", "..", "", "c:\\x", "a\0b", "\ud800", 7, None],
)
def test_index_cannot_point_outside(sharded, name):
    path = sharded / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a file name in the checkpoint folder"):
        read_checkpoint(sharded)


def test_index_and_shards_must_agree(sharded):
    path = sharded / INDEX_NAME
    original = json.loads(path.read_text())
    shards = sorted(set(original["weight_map"].values()))
    wrong = {**original["weight_map"], "lm_head.weight": shards[0]}
    for weight_map, message in (
        (wrong, "is in this shard but|is missing from its shard"),
        ({**original["weight_map"], "ghost": shards[0]}, "ghost. is missing from its shard"),
        ([], "weight_map expected an object"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(sharded)
    path.write_text(json.dumps(original))
    (sharded / WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds both"):
        read_checkpoint(sharded)
