# SPDX-License-Identifier: Apache-2.0
"""What a decoder computes with, on its device: packed linears, norms, cache scales, prefix.

`load_weights` reads them from a checkpoint block by block: a packed weight goes from the file to
the device and into the layout of its kernels, so the linears never exist in 16 bits.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefixquant import _C, ops
from prefixquant.checkpoint import Checkpoint, read_checkpoint
from prefixquant.checkpoint_layout import KEY_SHIFT, shift_tensor
from prefixquant.dtypes import usual_dtype
from prefixquant.errors import UnsupportedModelError, UserError
from prefixquant.hadamard import hadamard_signs, split_size
from prefixquant.roles import POINT_OF, Geometry, Roles, model_geometry, model_roles
from prefixquant.runtime.head import Head, make_head


@dataclass(frozen=True)
class Linear:
    """``x W^T (+ bias) (+ residual)`` of int8 x on a prepacked weight."""

    weight: Tensor  # as `prepack_w4` or `prepack_w8` returned it
    weight_scale: Tensor  # float32 [N]
    input_scale: Tensor  # float32 []
    bias: Tensor | None  # [N]
    bits: tuple[int, int]  # of the weight and of the integers x
    out_dtype: torch.dtype

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.gemm_fused(
            x,
            self.weight,
            self.weight_scale,
            self.input_scale,
            bias=self.bias,
            residual=residual,
            bits=(*self.bits, 8),
            out_dtype=self.out_dtype,
        )


@dataclass(frozen=True)
class Rotation:
    """An online Hadamard; size 1 is none."""

    size: int
    signs: Tensor | None


@dataclass(frozen=True)
class Norm:
    """``quantize(R6(x / rms(x) * weight) - shift)`` for the linear behind it."""

    weight: Tensor | None  # None: all ones, because it is folded into that linear
    eps: float
    output_scale: Tensor  # float32 [], the input scale of that linear
    output_bits: int
    shift: Tensor | None = None  # floating [C], which that linear's bias brings back
    rotation: Rotation = Rotation(1, None)  # R6, one for all norms of a decoder
    companded: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        q = self._quantized(x)
        return ops.compand_(q) if self.companded else q

    def _quantized(self, x: Tensor) -> Tensor:
        if self.rotation.size > 1:
            return ops.rmsnorm_hadamard_quantize(
                x,
                self.weight,
                self.eps,
                self.rotation.signs,
                self.output_scale,
                self.output_bits,
                self.shift,
            )
        return ops.rmsnorm_quantize(
            x, self.weight, self.eps, self.output_scale, self.output_bits, shift=self.shift
        )


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    input_norm: Norm
    qkv: Linear  # rows of q, then k, then v
    q_norm: Tensor | None  # [D], Qwen3
    k_norm: Tensor | None
    k_shift: Tensor | None  # float32 [Hkv, D], taken from the rotated keys
    k_scale: Tensor | None  # float32 [Hkv]; None at 16 bits
    v_scale: Tensor | None
    prefix_key: Tensor  # 16-bit [Hkv, P, D], after RoPE, R3 and the shift
    prefix_value: Tensor
    o: Linear
    post_norm: Norm
    gate_up: Linear  # rows of gate, then up
    down: Linear


@dataclass(frozen=True)
class Weights:
    """A whole decoder."""

    geometry: Geometry
    config: object  # the transformers configuration: RoPE and positions
    kv_bits: int
    rotation: Rotation  # R3, of queries and keys
    mlp_rotation: Rotation  # R4, of the down projection's input
    attention_rotation: Rotation  # R5, of the o projection's
    companded: bool  # the activations' levels
    embedding: Tensor  # 16-bit [V, C]
    blocks: list[Block]
    final_norm: Tensor  # [C]
    head: Head
    dtype: torch.dtype  # of the residual stream

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def prefix_length(self) -> int:
        return self.blocks[0].prefix_key.shape[1]

    def bytes(self) -> int:
        """Device memory of all tensors; one that is used twice counts once."""
        return sum(
            t.numel() * t.element_size() for t in {id(t): t for t in _tensors(self)}.values()
        )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def compute_dtype(
    device: torch.device, dtype: torch.dtype | None, stored: torch.dtype
) -> torch.dtype:
    """``dtype``, or float32 on a CPU and the stored 16-bit dtype elsewhere."""
    allowed = [torch.float16, torch.bfloat16]
    if device.type == "cpu":
        allowed.append(torch.float32)
    dtype = dtype or usual_dtype(device, stored)
    if dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise UserError(f"dtype: expected one of {names} on {device.type}, got {dtype}")
    return dtype


def rotation(size: int, device: torch.device) -> Rotation:
    k = split_size(size)[1]
    return Rotation(size, hadamard_signs(k).to(device) if k > 1 else None)


def load_weights(
    path: str | os.PathLike,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    kv_bits: int | None = None,
    head_bits: int = 16,
) -> Weights:
    """Reads a checkpoint to the device, block by block.

    Args:
        kv_bits: None: as the checkpoint says; 16 keeps keys and values unquantized.
        head_bits: 16, or 8 for a weight-only 8-bit ``lm_head``.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or of another version.
        UnsupportedModelError: its activations are not quantized with static scales.
        UserError: a wrong dtype or number of bits.
    """
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu or cuda, got {device}")
    if device.type == "cuda" and not _C.with_cuda:
        raise UserError(f"device: expected cpu, got {device}: this build has no CUDA kernels")
    checkpoint = read_checkpoint(path)
    _check_scheme(checkpoint)
    return _Reader(checkpoint, device, dtype, kv_bits).weights(head_bits)


def _check_scheme(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.quantization
    scheme = quantization.scheme
    if quantization.outlier_fraction:
        raise UnsupportedModelError(
            f"{checkpoint.path}: the runtime runs weights without outliers, got outlier_fraction "
            f"{quantization.outlier_fraction}; prefixquant.load runs this checkpoint"
        )
    if (
        scheme.weight_bits not in (4, 8)
        or scheme.activation_bits == 16
        or "dynamic" in (scheme.activation_mode, scheme.kv_mode)
    ):
        raise UnsupportedModelError(
            f"{checkpoint.path}: the runtime runs weights and statically quantized activations of "
            f"4 or 8 bits, got {scheme}; prefixquant.load runs this checkpoint"
        )


class _Reader:
    """Turns the tensors of a checkpoint into `Weights`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None,
        kv_bits: int | None,
    ):
        self.tensors = checkpoint.tensors
        self.scheme = checkpoint.quantization.scheme
        self.rotations = checkpoint.quantization.rotations
        self.has_prefix = bool(checkpoint.quantization.prefix_token_ids)
        self.config = checkpoint.hf_config()
        self.roles: Roles = model_roles(self.config)
        self.geometry = model_geometry(self.config)
        self.device = device
        self.norm_rotation = rotation(self.rotations.r6_size(self.geometry.hidden), device)
        self.stored = self.tensors[f"{self.roles.head}.weight"].dtype
        self.dtype = compute_dtype(device, dtype, self.stored)
        self.kv_bits = self.scheme.kv_bits if kv_bits is None else kv_bits
        if self.kv_bits not in (self.scheme.kv_bits, 16):
            raise UserError(
                f"kv_bits: expected {self.scheme.kv_bits} (the checkpoint's) or 16, got {kv_bits}"
            )

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device)

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.tensors else None

    def weights(self, head_bits: int) -> Weights:
        roles, rotations = self.roles, self.rotations
        final_norm = self.tensor(f"{roles.final_norm}.weight").to(self.dtype)
        return Weights(
            geometry=self.geometry,
            config=self.config,
            kv_bits=self.kv_bits,
            rotation=rotation(self.geometry.head_dim if rotations.r3 else 1, self.device),
            mlp_rotation=rotation(rotations.r4_size, self.device),
            attention_rotation=rotation(rotations.r5_size, self.device),
            companded=self.scheme.companded,
            embedding=self.tensor(f"{roles.embedding}.weight"),
            blocks=[self.block(index) for index in range(self.geometry.layers)],
            final_norm=final_norm,
            head=make_head(self.tensors[f"{roles.head}.weight"], head_bits, self.device),
            dtype=self.dtype,
        )

    def block(self, index: int) -> Block:
        roles, name = self.roles, f"{self.roles.blocks}.{index}"
        attention = f"{name}.{roles.attention}"
        quantized = self.kv_bits < 16
        return Block(
            input_norm=self.norm(name, roles.input_norm, "qkv"),
            qkv=self.linear(name, "q", "k", "v"),
            q_norm=self.head_norm(f"{attention}.q_norm.weight"),
            k_norm=self.head_norm(f"{attention}.k_norm.weight"),
            k_shift=self.optional(f"{attention}.{KEY_SHIFT}"),
            k_scale=self.tensor(f"{attention}.k_scale") if quantized else None,
            v_scale=self.tensor(f"{attention}.v_scale") if quantized else None,
            prefix_key=self.prefix(f"{attention}.prefix_key"),
            prefix_value=self.prefix(f"{attention}.prefix_value"),
            o=self.linear(name, "o"),
            post_norm=self.norm(name, roles.post_norm, "gate_up"),
            gate_up=self.linear(name, "gate", "up"),
            down=self.linear(name, "down"),
        )

    def linear(self, block: str, *linear_roles: str) -> Linear:
        """The rows of one or more linears that share their input, as one product."""
        paths = [f"{block}.{self.roles.linears[role]}" for role in linear_roles]
        weight = torch.cat([self.tensor(f"{path}.weight_packed") for path in paths])
        prepack = ops.prepack_w4 if self.scheme.weight_bits == 4 else ops.prepack_w8
        return Linear(
            prepack(weight),
            torch.cat([self.tensor(f"{path}.weight_scale") for path in paths]),
            self.tensor(f"{block}.{self.roles.point_scales[POINT_OF[linear_roles[0]]]}"),
            self.bias(paths),
            (self.scheme.weight_bits, self.scheme.container_bits),
            self.dtype,
        )

    def bias(self, paths: list[str]) -> Tensor | None:
        names = [f"{path}.bias" for path in paths]
        return torch.cat([self.tensor(n) for n in names]) if names[0] in self.tensors else None

    def norm(self, block: str, path: str, point: str) -> Norm:
        weight = self.tensor(f"{block}.{path}.weight").to(self.dtype)
        return Norm(
            None if bool((weight == 1).all()) else weight,
            self.geometry.eps,
            self.tensor(f"{block}.{self.roles.point_scales[point]}"),
            self.scheme.container_bits,
            self.shift(block, point),
            self.norm_rotation,
            self.scheme.companded,
        )

    def shift(self, block: str, point: str) -> Tensor | None:
        return self.optional(f"{block}.{shift_tensor(self.roles.point_scales[point])}")

    def head_norm(self, name: str) -> Tensor | None:
        return self.tensor(name).to(self.dtype) if self.roles.qk_norm else None

    def prefix(self, name: str) -> Tensor:
        if self.has_prefix:
            return self.tensor(name)
        geometry = self.geometry
        shape = (geometry.kv_heads, 0, geometry.head_dim)
        return torch.zeros(shape, dtype=self.stored, device=self.device)
