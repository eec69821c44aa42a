# SPDX-License-Identifier: Apache-2.0
"""Which tensors a checkpoint holds: name, shape and dtype of each, computed from config.json alone.

The writer checks what it is about to write against this list and the reader what it is about to
use, so one place says what format version 1 is. docs/checkpoint-format.md is its prose.
"""

import math
from dataclasses import dataclass
from typing import Any

from prefixquant.config import QuantizationConfig
from prefixquant.errors import CheckpointError, UnsupportedModelError
from prefixquant.hadamard import split_size
from prefixquant.packing import (
    OUTLIER_INDEX,
    OUTLIER_VALUE,
    PACKED,
    SCALE,
    packed_bytes,
    values_per_unit,
)
from prefixquant.solvers.weight import outlier_count

# safetensors dtype names, as they stand in the file header.
SIXTEEN_BIT = ("F16", "BF16")
FLOATING = ("F16", "BF16", "F32")

# Bounds that no real decoder comes near (the largest known: hidden 53248, 126 layers, vocabulary
# 262144). They keep a hostile config from asking for a billion names before anything is read.
_LARGEST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
}


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor must be. ``is_scale``: every value finite and above zero. ``below``: if not
    0, integers from 0 to below - 1, each larger than the one before."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_scale: bool = False
    below: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of one decoder that its tensors' shapes follow from."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> "ModelSizes":
        """Reads the sizes from a Hugging Face config, refusing wrong types and absurd values."""
        model_type = config.get("model_type")
        if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
            raise CheckpointError(
                f"{where}: model_type expected llama, mistral, qwen2 or qwen3, got {model_type!r}"
            )
        hidden = _size(config, "hidden_size", where)
        heads = _size(config, "num_attention_heads", where)
        kv_heads = _size(config, "num_key_value_heads", where, default=heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads expected a multiple of num_key_value_heads, "
                f"got {heads} and {kv_heads}"
            )
        if config.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size expected a multiple of num_attention_heads where head_dim "
                f"is not given, got {hidden} and {heads}"
            )
        # The families differ: llama and qwen3 have one flag for all four attention linears, qwen2
        # always has a bias on q, k and v and never on o, mistral has none at all.
        flag = _flag(config, "attention_bias", where) if model_type in ("llama", "qwen3") else False
        return cls(
            model_type=model_type,
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size", where),
            num_layers=_size(config, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", where, default=hidden // heads),
            vocab_size=_size(config, "vocab_size", where),
            qkv_bias=flag or model_type == "qwen2",
            o_bias=flag,
            mlp_bias=_flag(config, "mlp_bias", where) if model_type == "llama" else False,
            qk_norm=model_type == "qwen3",
        )

    @property
    def attended_size(self) -> int:
        """The width of all heads: what o_proj reads."""
        return self.num_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """name inside a layer -> (out features N, in features K, has a bias)."""
        q = self.attended_size
        kv = self.num_kv_heads * self.head_dim
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (q, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q, self.o_bias),
            "mlp.gate_proj": (intermediate, hidden, self.mlp_bias),
            "mlp.up_proj": (intermediate, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, intermediate, self.mlp_bias),
        }


# The four activation points of a block, by the name of their scale.
ACTIVATION_SCALES = (
    "self_attn.input_scale",
    "self_attn.o_proj.input_scale",
    "mlp.input_scale",
    "mlp.down_proj.input_scale",
)


def scale_tensor(name: str, mode: str) -> str:
    """The tensor at a static scale's place: the scale, or in dynamic mode a clip.

    A clip is the part of a token's largest absolute value that its own scale covers.
    """
    return name if mode == "static" else name.removesuffix("_scale") + "_clip"


# The points with a shift where a checkpoint is centred: those behind a norm.
_SHIFTED = ("self_attn.input_scale", "mlp.input_scale")


KEY_SHIFT = "k_shift"  # of the keys of an attention, float32: what their scale does not see


def shift_tensor(scale: str) -> str:
    """The name of the shift beside an activation scale: what is subtracted before the scale
    divides."""
    return scale.removesuffix("_scale") + "_shift"


def _size(config: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if type(value) is not int or not 1 <= value <= _LARGEST[key]:
        raise CheckpointError(
            f"{where}: {key} expected an integer from 1 to {_LARGEST[key]}, got {short(value)}"
        )
    return value


def _flag(config: dict[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise CheckpointError(f"{where}: {key} expected true or false, got {short(value)}")
    return value


def short(value: Any, length: int = 60) -> str:
    """A hostile value must not fill the screen."""
    text = value if isinstance(value, Exception) else repr(value)
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def check_model_config(
    config: dict[str, Any], quantization: QuantizationConfig, where: str = "config.json"
) -> ModelSizes:
    """Checks the parts of config.json that the format depends on, and what the two halves of it say
    about each other."""
    sizes = ModelSizes.from_config(config, where)
    if config.get("tie_word_embeddings", False) is not False:
        raise CheckpointError(
            f"{where}: tie_word_embeddings expected false (rotation unties the embeddings), "
            f"got {short(config['tie_word_embeddings'])}"
        )
    eps = config.get("rms_norm_eps")
    if type(eps) is not float or not (math.isfinite(eps) and 0 < eps < 1):
        raise CheckpointError(
            f"{where}: rms_norm_eps expected a number between 0 and 1, got {short(eps)}"
        )
    rotations = quantization.rotations
    for name, block, what, width in (
        ("r4_block_size", rotations.r4_size, "intermediate_size", sizes.intermediate_size),
        ("r5_block_size", rotations.r5_size, "the width of all heads", sizes.attended_size),
    ):
        if block < 1 or width % block:
            raise CheckpointError(
                f"{where}: {name} expected a divisor of {what} {width}, got {block}"
            )
    if rotations.r6:
        try:
            split_size(sizes.hidden_size)
        except UnsupportedModelError as error:
            raise CheckpointError(f"{where}: r6 of hidden_size: {error}") from error
    bad = [t for t in quantization.prefix_token_ids if t >= sizes.vocab_size]
    if bad:
        raise CheckpointError(
            f"{where}: prefix_token_ids expected ids below vocab_size {sizes.vocab_size}, "
            f"got {bad[0]}"
        )
    for name, (n, k, _) in sizes.linears().items():
        _check_linear(name, n, k, quantization, where)
    return sizes


def _check_linear(name: str, n: int, k: int, quantization: QuantizationConfig, where: str) -> None:
    unit = values_per_unit(quantization.weight_bits)
    if k % unit:
        raise CheckpointError(
            f"{where}: {name} expected a number of input features that is a multiple of {unit} "
            f"to pack {quantization.weight_bits} bits, got {k}"
        )
    if quantization.group_size and k % quantization.group_size:
        raise CheckpointError(
            f"{where}: group_size expected a divisor of the {k} input features of {name}, "
            f"got {quantization.group_size}"
        )
    if quantization.outlier_fraction and n * k > 1 << 31:
        raise CheckpointError(f"{where}: {name} expected at most 2^31 weights to index outliers")


def layer_tensors(sizes: ModelSizes, quantization: QuantizationConfig) -> dict[str, TensorSpec]:
    """The tensors of one decoder layer, by their name inside the layer."""
    specs: dict[str, TensorSpec] = {}
    for name, (n, k, has_bias) in sizes.linears().items():
        bits, group = quantization.weight_bits, quantization.group_size
        specs[f"{name}.{PACKED}"] = (
            TensorSpec((n, k), ("I8",))
            if bits == 8
            else TensorSpec((n, packed_bytes(k, bits)), ("U8",))
        )
        scales = (n, k // group) if group else (n,)
        specs[f"{name}.{SCALE}"] = TensorSpec(scales, ("F32",), is_scale=True)
        count = outlier_count((n, k), quantization.outlier_fraction)
        if count:
            specs[f"{name}.{OUTLIER_INDEX}"] = TensorSpec((count,), ("I32",), below=n * k)
            specs[f"{name}.{OUTLIER_VALUE}"] = TensorSpec((count,), SIXTEEN_BIT)
        if has_bias or quantization.centred:
            specs[f"{name}.bias"] = TensorSpec((n,), FLOATING)
    if quantization.activation_bits < 16:
        for scale in ACTIVATION_SCALES:
            name = scale_tensor(scale, quantization.activation_mode)
            specs[name] = TensorSpec((), ("F32",), is_scale=True)
    if quantization.centred:
        for scale in _SHIFTED:
            specs[shift_tensor(scale)] = TensorSpec((sizes.hidden_size,), SIXTEEN_BIT)
    if quantization.centred_keys:
        specs[f"self_attn.{KEY_SHIFT}"] = TensorSpec((sizes.num_kv_heads, sizes.head_dim), ("F32",))
    if quantization.kv_bits < 16:
        for scale in ("self_attn.k_scale", "self_attn.v_scale"):
            name = scale_tensor(scale, quantization.kv_mode)
            specs[name] = TensorSpec((sizes.num_kv_heads,), ("F32",), is_scale=True)
    prefix_length = len(quantization.prefix_token_ids)
    if prefix_length:
        for name in ("self_attn.prefix_key", "self_attn.prefix_value"):
            specs[name] = TensorSpec(
                (sizes.num_kv_heads, prefix_length, sizes.head_dim), SIXTEEN_BIT
            )
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        specs[name] = TensorSpec((sizes.hidden_size,), SIXTEEN_BIT)
    if sizes.qk_norm:
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            specs[name] = TensorSpec((sizes.head_dim,), SIXTEEN_BIT)
    return specs


def expected_tensors(sizes: ModelSizes, quantization: QuantizationConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint, by its full name, in the order of the forward pass."""
    vocabulary = TensorSpec((sizes.vocab_size, sizes.hidden_size), SIXTEEN_BIT)
    specs = {"model.embed_tokens.weight": vocabulary}
    layer = layer_tensors(sizes, quantization)
    for i in range(sizes.num_layers):
        specs.update({f"model.layers.{i}.{name}": spec for name, spec in layer.items()})
    specs["model.norm.weight"] = TensorSpec((sizes.hidden_size,), SIXTEEN_BIT)
    specs["lm_head.weight"] = vocabulary
    return specs


def check_tensors(
    found: dict[str, tuple[tuple[int, ...], str]],
    expected: dict[str, TensorSpec],
    where: str,
) -> None:
    """Compares what there is (name -> shape, safetensors dtype) with what there must be.

    A wrong dtype is reported before a wrong shape: packing changes both, and the dtype says why.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]} is missing ({len(missing)} missing in all)"
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{where}: tensor {short(unexpected[0])} does not belong in this checkpoint "
            f"({len(unexpected)} unexpected in all)"
        )
    for name, spec in expected.items():
        shape, dtype = found[name]
        if dtype not in spec.dtypes:
            raise CheckpointError(
                f"{where}: tensor {name} expected dtype {' or '.join(spec.dtypes)}, got {dtype}"
            )
        if shape != spec.shape:
            raise CheckpointError(
                f"{where}: tensor {name} expected shape {list(spec.shape)}, got {list(shape)}"
            )


_BYTES = {"U8": 1, "I8": 1, "I32": 4, "F16": 2, "BF16": 2, "F32": 4}


def storage(sizes: ModelSizes, quantization: QuantizationConfig) -> dict[str, int]:
    """Bytes on the disk by kind, and ``float16`` for the same tensors of the unquantized model.

    A bias may be stored in 16 or 32 bits; it is counted as 32, which is what `quantize` writes.
    """
    totals = dict.fromkeys(
        (
            "linear_weights",
            "weight_scales",
            "outliers",
            "biases",
            "static_scales",
            "shifts",
            "prefix",
            "norms",
        ),
        0,
    )
    for name, spec in layer_tensors(sizes, quantization).items():
        if name.endswith(f".{PACKED}"):
            kind = "linear_weights"
        elif name.endswith(f".{SCALE}"):
            kind = "weight_scales"
        elif name.endswith((f".{OUTLIER_INDEX}", f".{OUTLIER_VALUE}")):
            kind = "outliers"
        elif name.endswith(".bias"):
            kind = "biases"
        elif spec.is_scale:
            kind = "static_scales"
        elif name.endswith("_shift"):
            kind = "shifts"
        elif ".prefix_" in name:
            kind = "prefix"
        else:
            kind = "norms"
        dtype = "F32" if kind == "biases" else spec.dtypes[0]
        totals[kind] += math.prod(spec.shape) * _BYTES[dtype] * sizes.num_layers
    totals["norms"] += 2 * sizes.hidden_size
    totals["embedding"] = totals["lm_head"] = 2 * sizes.vocab_size * sizes.hidden_size
    total = sum(totals.values())
    linear_values = sizes.num_layers * sum(
        n * k + n * has_bias for n, k, has_bias in sizes.linears().values()
    )
    totals["total"] = total
    totals["float16"] = (
        2 * linear_values + totals["embedding"] + totals["lm_head"] + totals["norms"]
    )
    return totals
