# SPDX-License-Identifier: Apache-2.0
"""Which module of a transformers model plays which role: the only place that knows module names.

llama, mistral, qwen2 and qwen3 name their modules alike; what differs (q/k norms, attention biases)
is read off the modules. A new family is a new entry of `ARCHITECTURES`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefixquant.errors import UnsupportedModelError

# RoPE variants whose angles depend on the position alone. Those that depend on the sequence length
# (dynamic, longrope) would rotate a prefix at positions -P..-1 differently as the prompt grows.
_ROPE_TYPES = ("default", "llama3", "linear", "yarn")

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

# The four activation points of a block and the linears that read each.
POINTS: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
POINT_OF = {role: point for point, roles in POINTS.items() for role in roles}


@dataclass(frozen=True)
class Roles:
    """Module paths: the first four from the model, the rest from a block."""

    decoder: str
    embedding: str
    final_norm: str
    head: str
    blocks: str
    attention: str
    mlp: str
    input_norm: str
    post_norm: str
    linears: dict[str, str]  # role of LINEARS -> path in the block
    point_scales: dict[str, str]  # activation point -> name of its scale in the block
    qk_norm: bool


def _decoder_roles(*, qk_norm: bool) -> Roles:
    return Roles(
        decoder="model",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        blocks="model.layers",
        attention="self_attn",
        mlp="mlp",
        input_norm="input_layernorm",
        post_norm="post_attention_layernorm",
        linears={
            **{role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
            **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
        },
        point_scales={
            "qkv": "self_attn.input_scale",
            "o": "self_attn.o_proj.input_scale",
            "gate_up": "mlp.input_scale",
            "down": "mlp.down_proj.input_scale",
        },
        qk_norm=qk_norm,
    )


ARCHITECTURES: dict[str, Roles] = {
    "llama": _decoder_roles(qk_norm=False),
    "mistral": _decoder_roles(qk_norm=False),
    "qwen2": _decoder_roles(qk_norm=False),
    "qwen3": _decoder_roles(qk_norm=True),
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float


def model_roles(config) -> Roles:
    """The roles for a transformers config.

    Raises:
        UnsupportedModelError: the architecture, its activation, its RoPE variant or its attention
            pattern is not one this package runs.
    """
    roles = ARCHITECTURES.get(config.model_type)
    if roles is None:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is not supported; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act: expected silu, got {config.hidden_act!r}")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope_type: expected one of {', '.join(_ROPE_TYPES)}, got {rope_type!r}"
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None)
    if sliding and config.model_type == "mistral":  # mistral slides in every layer once it is set
        layer_types = {"sliding_attention"}
    if layer_types != {"full_attention"}:
        raise UnsupportedModelError(
            "attention: expected full attention in every layer, got "
            f"{', '.join(sorted(layer_types))} (sliding_window={sliding})"
        )
    return roles


def model_geometry(config) -> Geometry:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
    )


@dataclass
class BlockWeights:
    """The float weights of one block: W [N, K], bias [N] or None per linear, norms [C] or [D].

    ``shifts`` (`prefixquant.centre`): "qkv" and "gate_up" -> [C], what is subtracted behind the
    norm; "k" -> [H_kv, D], what is subtracted from the keys behind RoPE and R3.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    shifts: dict[str, Tensor] = field(default_factory=dict)

    def to(self, *, device=None, dtype=None) -> "BlockWeights":
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device=device, dtype=dtype)

        return BlockWeights(
            {role: move(w) for role, w in self.weights.items()},
            {role: move(b) for role, b in self.biases.items()},
            *(move(t) for t in (self.input_norm, self.post_norm, self.q_norm, self.k_norm)),
            {point: move(s) for point, s in self.shifts.items()},
        )


def block_weights(block: nn.Module, roles: Roles) -> BlockWeights:
    """Reads a block's weights, without copying."""
    weights, biases = {}, {}
    for role, path in roles.linears.items():
        linear = block.get_submodule(path)
        weights[role] = linear.weight.detach()
        biases[role] = None if linear.bias is None else linear.bias.detach()
    attention = block.get_submodule(roles.attention)
    norm = {
        name: getattr(attention, name).weight.detach() if roles.qk_norm else None
        for name in ("q_norm", "k_norm")
    }
    return BlockWeights(
        weights,
        biases,
        block.get_submodule(roles.input_norm).weight.detach(),
        block.get_submodule(roles.post_norm).weight.detach(),
        **norm,
    )


def model_blocks(model: nn.Module, roles: Roles) -> nn.ModuleList:
    return model.get_submodule(roles.blocks)


def rope_tables(model: nn.Module, roles: Roles, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, D], of the model's own RoPE at ``positions`` [T], also negative."""
    rotary = model.get_submodule(roles.decoder).rotary_emb
    probe = torch.zeros(1, dtype=torch.float32, device=positions.device)  # gives device and dtype
    cos, sin = rotary(probe, positions[None])
    return cos[0], sin[0]
