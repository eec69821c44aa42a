# SPDX-License-Identifier: Apache-2.0
"""The decoder block as functions on plain tensors, with quantizers that can be switched per point.

One definition serves the float model (no quantizer), the outlier scan, the calibration and the fake
quantization that the packed kernels are compared with. Everything runs in the dtype of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.config import Rotations
from prefixquant.quantizer import fake_quantize, fake_quantize_dynamic
from prefixquant.roles import BlockWeights, Geometry
from prefixquant.rotate import rotate_last_dim


@dataclass(frozen=True)
class BlockShape:
    """What the forward pass needs beside weights: sizes, and the online rotations' block sizes
    (1: none)."""

    geometry: Geometry
    r3_size: int
    r4_size: int
    r5_size: int = 1
    r6_size: int = 1  # the hidden size, or none

    @classmethod
    def of(cls, geometry: Geometry, rotations: Rotations) -> "BlockShape":
        """That of a model's blocks with these rotations."""
        return cls(
            geometry,
            geometry.head_dim if rotations.r3 else 1,
            rotations.r4_size,
            rotations.r5_size,
            rotations.r6_size(geometry.hidden),
        )


@dataclass
class BlockScales:
    """Scales of one block. A point that is absent is not quantized.

    ``activations``: point -> float32 []; ``k``, ``v``: float32 [H_kv] or None. Static scales, or
    where a mode is dynamic the clips of `fake_quantize_dynamic`, per token (and head).
    """

    activations: dict[str, Tensor] = field(default_factory=dict)
    k: Tensor | None = None
    v: Tensor | None = None
    activation_bits: int = 16
    kv_bits: int = 16
    activation_mode: str = "static"
    kv_mode: str = "static"
    companded: bool = False  # the activations' levels (`quantizer.compand`)


@dataclass
class PrefixKV:
    """Keys (after RoPE and R3, less their shift) and values of the prefix, [H_kv, P, D]; P may be
    0."""

    key: Tensor
    value: Tensor

    @property
    def length(self) -> int:
        return self.key.shape[1]


# Called with the name of a point ("qkv", "o", "gate_up", "down", "attended", "mlp", "q", "k", "v")
# and the tensor there, before quantization. "mlp" is the down_proj input before R4, where outliers
# are defined, "attended" the o_proj input before R5, head by head.
Tap = Callable[[str, Tensor], None]


def no_tap(name: str, value: Tensor) -> None:
    pass


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32."""
    wide = x.float()
    return ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)) * weight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D], cos and sin [T, D]: the half-split rotation of the llama family."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


def quantize_point(x: Tensor, point: str, scales: BlockScales) -> Tensor:
    scale = scales.activations.get(point)
    if scale is None:
        return x
    quantizer = fake_quantize_dynamic if scales.activation_mode == "dynamic" else fake_quantize
    return quantizer(x, scale, scales.activation_bits, scales.companded)


def normed(block: BlockWeights, shape: BlockShape, point: str, x: Tensor) -> Tensor:
    """What the linears of "qkv" or "gate_up" read of the stream x [B, T, C], not quantized: behind
    the norm and R6, with the point's shift taken out."""
    weight = block.input_norm if point == "qkv" else block.post_norm
    y, shift = rms_norm(x, weight, shape.geometry.eps), block.shifts.get(point)
    y = rotate_last_dim(y, shape.r6_size)
    return y if shift is None else y - shift


def quantize_heads(x: Tensor, scale: Tensor | None, bits: int, mode: str = "static") -> Tensor:
    """Fake quantization of K or V [B, H, T, D], one scale (or clip) per head [H]."""
    if scale is None:
        return x
    quantizer = fake_quantize_dynamic if mode == "dynamic" else fake_quantize
    return quantizer(x, scale[:, None, None], bits)


def linear(block: BlockWeights, role: str, x: Tensor) -> Tensor:
    return F.linear(x, block.weights[role], block.biases[role])


def head_projection(block: BlockWeights, shape: BlockShape, role: str, x: Tensor) -> Tensor:
    """x [.., C] -> [.., H, D]: the heads of role "q", "k" or "v" before RoPE, behind the q/k norm
    where there is one."""
    heads = linear(block, role, x).unflatten(-1, (-1, shape.geometry.head_dim))
    norm = {"q": block.q_norm, "k": block.k_norm}.get(role)
    return heads if norm is None else rms_norm(heads, norm, shape.geometry.eps)


def project_qkv(
    block: BlockWeights, shape: BlockShape, x: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, C] (normed, quantized) -> q [B, H, T, D], k, v [B, H_kv, T, D]; q and k after RoPE
    and R3, the shift of the keys taken out."""
    q, k, v = (head_projection(block, shape, role, x).transpose(1, 2) for role in ("q", "k", "v"))
    q, k = (rotate_last_dim(apply_rope(t, *rope), shape.r3_size) for t in (q, k))
    shift = block.shifts.get("k")
    return q, k if shift is None else k - shift[:, None], v


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: PrefixKV | None) -> Tensor:
    """Causal attention over [prefix | tokens].

    q [B, H, T, D], k and v [B, H_kv, T, D] -> [B, T, H*D].
    """
    batch, heads = q.shape[:2]
    extra = prefix.length if prefix is not None else 0
    if extra:
        k, v = (
            torch.cat((p.to(t.dtype).expand(batch, -1, -1, -1), t), dim=2)
            for p, t in ((prefix.key, k), (prefix.value, v))
        )
        # A query of zeros for each prefix token, dropped again below, makes the mask a plain causal
        # one, which every attention kernel has built in.
        q = F.pad(q, (0, 0, extra, 0))
    repeats = heads // k.shape[1]
    if repeats > 1:
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, extra:]
    return out.transpose(1, 2).flatten(2)


def attention_half(
    block: BlockWeights,
    shape: BlockShape,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    prefix: PrefixKV | None = None,
    scales: BlockScales | None = None,
    tap: Tap = no_tap,
) -> Tensor:
    """``x + o_proj(R5(attention(q, k, v)))`` for x [B, T, C]."""
    scales = scales or BlockScales()
    read = normed(block, shape, "qkv", x)
    tap("qkv", read)
    q, k, v = project_qkv(block, shape, quantize_point(read, "qkv", scales), rope)
    for name, value in (("q", q), ("k", k), ("v", v)):
        tap(name, value)
    k = quantize_heads(k, scales.k, scales.kv_bits, scales.kv_mode)
    v = quantize_heads(v, scales.v, scales.kv_bits, scales.kv_mode)
    mixed = attend(q, k, v, prefix)
    tap("attended", mixed)
    mixed = rotate_last_dim(mixed, shape.r5_size)
    tap("o", mixed)
    return x + linear(block, "o", quantize_point(mixed, "o", scales))


def mlp_half(
    block: BlockWeights,
    shape: BlockShape,
    x: Tensor,
    scales: BlockScales | None = None,
    tap: Tap = no_tap,
) -> Tensor:
    """``x + down_proj(R4(silu(gate) * up))`` for x [B, T, C]."""
    scales = scales or BlockScales()
    read = normed(block, shape, "gate_up", x)
    tap("gate_up", read)
    read = quantize_point(read, "gate_up", scales)
    inner = F.silu(linear(block, "gate", read)) * linear(block, "up", read)
    tap("mlp", inner)
    inner = rotate_last_dim(inner, shape.r4_size)
    tap("down", inner)
    return x + linear(block, "down", quantize_point(inner, "down", scales))


def block_forward(
    block: BlockWeights,
    shape: BlockShape,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    prefix: PrefixKV | None = None,
    scales: BlockScales | None = None,
    tap: Tap = no_tap,
) -> Tensor:
    """One decoder block, x [B, T, C] -> [B, T, C]."""
    x = attention_half(block, shape, x, rope, prefix, scales, tap)
    return mlp_half(block, shape, x, scales, tap)
