# SPDX-License-Identifier: Apache-2.0
"""Decoders of well-known sizes with random weights: for speed and memory, which do not depend on
the values. Nothing here is ever in 16 bits but what a checkpoint keeps in 16 bits."""

import torch
from torch import Tensor

from prefixquant import _C, ops
from prefixquant.config import Scheme
from prefixquant.errors import UserError
from prefixquant.roles import Geometry, model_geometry
from prefixquant.runtime.head import Head, head_of_levels, make_head
from prefixquant.runtime.weights import Block, Linear, Norm, Weights, compute_dtype, rotation

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
# The config.json values of the models, as far as speed depends on them.
SHAPES: dict[str, dict] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    },
}

_LEVEL_RMS = {4: 4.6, 8: 73.9}  # of uniformly random integers of so many bits


def shape_config(name: str, **changes):
    """The transformers configuration of a shape.

    Raises:
        UserError: no shape has that name.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise UserError(f"shape: expected one of {', '.join(SHAPES)}, got {name!r}")
    return AutoConfig.for_model(**{**SHAPES[name], "tie_word_embeddings": False, **changes})


def random_weights(
    config,
    scheme: Scheme,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    head_bits: int = 16,
    prefix: int = 1,
    seed: int = 0,
) -> Weights:
    """`Weights` of a configuration with random values whose activations stay of order 1; centred
    and rotated as checkpoints are by default.

    Args:
        scheme: static activations of 4 or 8 bits, weights of 4 or 8.
        head_bits: 16 or 8.
        prefix: tokens of the prefix.
    """
    if device.type == "cuda" and not _C.with_cuda:
        raise UserError(f"device: expected cpu, got {device}: this build has no CUDA kernels")
    maker = _Maker(model_geometry(config), scheme, device, dtype, prefix, seed)
    return maker.weights(config, head_bits)


class _Maker:
    def __init__(
        self,
        geometry: Geometry,
        scheme: Scheme,
        device: torch.device,
        dtype: torch.dtype | None,
        prefix: int,
        seed: int,
    ):
        self.geometry = geometry
        self.scheme = scheme
        self.device = device
        self.dtype = compute_dtype(device, dtype, torch.float16)
        self.stored = torch.float16 if self.dtype == torch.float32 else self.dtype
        self.prefix = prefix
        four_bit = scheme.activation_bits == 4
        self.attention_rotation = rotation(
            geometry.heads * geometry.head_dim if four_bit else 1, device
        )
        self.norm_rotation = rotation(geometry.hidden if four_bit else 1, device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def weights(self, config, head_bits: int) -> Weights:
        g = self.geometry
        embedding = self.normal(g.vocab, g.hidden)
        return Weights(
            geometry=g,
            config=config,
            kv_bits=self.scheme.kv_bits,
            rotation=rotation(g.head_dim, self.device),
            mlp_rotation=rotation(g.intermediate, self.device),
            attention_rotation=self.attention_rotation,
            companded=self.scheme.companded,
            embedding=embedding,
            blocks=[self.block(config.model_type == "qwen3") for _ in range(g.layers)],
            final_norm=torch.ones(g.hidden, dtype=self.dtype, device=self.device),
            head=self.head(head_bits),
            dtype=self.dtype,
        )

    def block(self, qk_norm: bool) -> Block:
        g, quantized = self.geometry, self.scheme.kv_bits < 16
        norm = torch.ones(g.head_dim, dtype=self.dtype, device=self.device) if qk_norm else None
        qkv = self.linear((g.heads + 2 * g.kv_heads) * g.head_dim, g.hidden)
        gate_up = self.linear(2 * g.intermediate, g.hidden)
        return Block(
            input_norm=self.norm(qkv),
            qkv=qkv,
            q_norm=norm,
            k_norm=norm,
            k_shift=self.normal(g.kv_heads, g.head_dim).float() / 8 if quantized else None,
            k_scale=self.full((g.kv_heads,), 3.0, self.scheme.kv_bits) if quantized else None,
            v_scale=self.full((g.kv_heads,), 3.0, self.scheme.kv_bits) if quantized else None,
            prefix_key=self.normal(g.kv_heads, self.prefix, g.head_dim),
            prefix_value=self.normal(g.kv_heads, self.prefix, g.head_dim),
            o=self.linear(g.hidden, g.heads * g.head_dim),
            post_norm=self.norm(gate_up),
            gate_up=gate_up,
            down=self.linear(g.hidden, g.intermediate),
        )

    def head(self, bits: int) -> Head:
        g = self.geometry
        if bits == 8:  # no 16-bit weight, as where a checkpoint is loaded
            return head_of_levels(
                self.levels(g.vocab, g.hidden, 8), self.scale(g.vocab, g.hidden, 8)
            )
        return make_head(self.normal(g.vocab, g.hidden), bits, self.device)

    def linear(self, n: int, k: int) -> Linear:
        """Outputs of order 1 for inputs of order 1."""
        bits = self.scheme.weight_bits
        prepack = ops.prepack_w4 if bits == 4 else ops.prepack_w8
        return Linear(
            prepack(self.levels(n, k, bits)),
            self.scale(n, k, bits),
            self.full((), 3.0, self.scheme.container_bits),
            self.normal(n).float() / 8,
            (bits, self.scheme.container_bits),
            self.dtype,
        )

    def levels(self, n: int, k: int, bits: int) -> Tensor:
        """Random integers: packed uint8 [n, k / 2], or int8 [n, k]."""
        shape, dtype = ((n, k // 2), torch.uint8) if bits == 4 else ((n, k), torch.int8)
        integers = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return integers.random_(0, 256, generator=self.generator).view(dtype)

    def scale(self, n: int, k: int, bits: int) -> Tensor:
        """With `levels`, products of order 1."""
        return torch.full((n,), k**-0.5 / _LEVEL_RMS[bits], device=self.device)

    def norm(self, following: Linear) -> Norm:
        """With R6 a weight as the balance of channels leaves it, about 1."""
        g, scheme, weight = self.geometry, self.scheme, None
        if self.norm_rotation.size > 1:
            weight = (self.normal(g.hidden).float() / 8).exp().to(self.dtype)
        shift = self.normal(g.hidden) / 8
        return Norm(
            weight,
            g.eps,
            following.input_scale,
            scheme.container_bits,
            shift,
            self.norm_rotation,
            scheme.companded,
        )

    def full(self, shape: tuple[int, ...], largest: float, bits: int) -> Tensor:
        """Scales that map ``largest`` to the largest level."""
        return torch.full(shape, largest / (2 ** (bits - 1) - 1), device=self.device)

    def normal(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=self.stored, device=self.device)
        return values.normal_(generator=self.generator)
