# SPDX-License-Identifier: Apache-2.0
"""Static scales and integer weights of one block, found on data with the prefix in place.

The block is quantized from its input to its output. At each activation point the scale is searched
first (on the float weights that read it), then those weights are compensated for the errors made so
far and solved on the *quantized* inputs, so every later choice sees the errors of the earlier ones
and makes up for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant.block import (
    BlockScales,
    BlockShape,
    PrefixKV,
    attend,
    attention_half,
    linear,
    mlp_half,
    normed,
    project_qkv,
    quantize_heads,
    quantize_point,
)
from prefixquant.compensate import compensate, input_shortfall, output_shortfall
from prefixquant.config import COMPENSATION, RecipeConfig, Scheme
from prefixquant.counted import Counted
from prefixquant.quantizer import fake_quantize, fake_quantize_dynamic, matmul_dtype, minmax_scale
from prefixquant.roles import POINTS, BlockWeights
from prefixquant.rotate import rotate_last_dim
from prefixquant.solvers import QuantizedWeight, WeightSolver, layer_error

# Candidates as fractions of the min-max scale: from the lowest in even steps, then finer ones near
# the best. A search down to 0.05 finds less error in the next linears and is no better for it.
_LOWEST = {4: 0.25, 8: 0.4}
_STEPS = 16
_FINE = tuple(0.01 * k for k in range(-4, 5))
_HEAD_RATIOS = tuple(0.3 + 0.025 * k for k in range(29))  # 0.3 .. 1.0
_SEARCH_TOKENS = 2048  # tokens an activation search looks at, evenly spaced over the samples


@dataclass
class CalibratedBlock:
    """What one block becomes, and what it cost."""

    weights: dict[str, QuantizedWeight]  # empty when weights stay in 16 bits
    scales: BlockScales
    simulated: BlockWeights  # the block with its weights dequantized: the fake-quantized block
    relative_error: float  # |y_q - y|^2 / |y|^2 of the block's output, streams included
    weight_errors: dict[str, float]  # role -> `solvers.layer_error`
    targets: dict[str, Tensor] = field(default_factory=dict)  # role -> the weight that was rounded


@dataclass
class Streams:
    """The residual stream [n, T, C] entering the block in the float and in the quantized model."""

    floating: Tensor
    quantized: Tensor
    counted: Counted | None = None  # made for the first block where it is not given


@dataclass
class FloatPass:
    """The float model's residual stream [n, T, C] around one block: what quantization aims at."""

    entering: Tensor
    middle: Tensor  # after attention
    leaving: Tensor


def _batches(*tensors: Tensor, size: int = 2) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(t.split(size) for t in tensors), strict=True)


def search_activation_scale(
    x: Tensor, weights: list[Tensor], bits: int, mode: str = "static", companded: bool = False
) -> Tensor:
    """The scale s that minimises ``|(Q(x) - x) [W_1; W_2; ...]^T|^2``: the error that quantizing x
    makes in the outputs of the linears that read it. In dynamic mode, the clip.

    Args:
        x: [..., K].
        weights: float [N_i, K].
        mode: "static" or "dynamic".
        companded: whether Q's levels are (`quantizer.compand`).

    Returns:
        float32 [].
    """
    rows = x.reshape(-1, x.shape[-1])
    quantizer, start = fake_quantize, minmax_scale(rows.abs().max(), bits, companded)
    if mode == "dynamic":
        quantizer, start = fake_quantize_dynamic, torch.ones_like(start)
    rows = rows[:: max(1, len(rows) // _SEARCH_TOKENS)]
    dtype = matmul_dtype(x.device)
    readers = torch.cat(weights)
    # d W^T W d^T is the same error: a smaller product where the linears have more outputs than
    # inputs.
    wide = len(readers) > readers.shape[1]
    factor = (readers.T @ readers if wide else readers).to(dtype)

    def error(ratio: float) -> float:
        delta = quantizer(rows, start * ratio, bits, companded) - rows
        moved = F.linear(delta.to(dtype), factor).float()
        return (moved * delta if wide else moved.square()).sum().item()

    errors = {ratio: error(ratio) for ratio in torch.linspace(_LOWEST[bits], 1, _STEPS).tolist()}
    coarse = min(errors, key=errors.get)
    fine = [coarse + step for step in _FINE if mode == "static" or coarse + step <= 1]
    errors |= {ratio: error(ratio) for ratio in fine}
    return start * min(errors, key=errors.get)


def search_head_scales(x: Tensor, metric: Tensor, bits: int, mode: str = "static") -> Tensor:
    """Per head the scale (in dynamic mode the clip) that minimises ``sum_t e_t G e_t^T`` with
    e = Q(x) - x.

    For K, G = q^T q of the queries that meet the head, which makes the sum the squared error of the
    attention logits; for V, G = W_o^T W_o of the o_proj columns that the head feeds.

    Args:
        x: [H, N, D]; metric: [H, D, D].

    Returns:
        float32 [H].
    """
    quantizer, start = fake_quantize, minmax_scale(x.abs().amax(dim=(1, 2)), bits)
    if mode == "dynamic":
        quantizer, start = fake_quantize_dynamic, torch.ones_like(start)
    tokens = x[:, :: max(1, x.shape[1] // _SEARCH_TOKENS)]
    best, least = start.clone(), torch.full_like(start, torch.inf)
    for ratio in _HEAD_RATIOS:
        scale = start * ratio
        delta = quantizer(tokens, scale[:, None, None], bits) - tokens
        error = ((delta @ metric) * delta).sum(dim=(1, 2))
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def _grouped_metric(per_query_head: Tensor, kv_heads: int) -> Tensor:
    """[H, D, D] -> [H_kv, D, D], summed over the query heads that share a KV head."""
    return per_query_head.unflatten(0, (kv_heads, -1)).sum(dim=1)


class _BlockQuantizer:
    """Quantizes one block front to back; see `calibrate_block`."""

    def __init__(
        self,
        block: BlockWeights,
        shape: BlockShape,
        scheme: Scheme,
        rope: tuple[Tensor, Tensor],
        prefix: PrefixKV,
        solver: WeightSolver,
        compensation: float,
        counted: Tensor,
    ):
        self.solver = solver
        self.compensation = compensation
        self.float_block = block
        self.shape = shape
        self.scheme = scheme
        self.rope = rope
        self.prefix = prefix
        self.counted = counted
        self.scales = BlockScales(
            activation_bits=scheme.activation_bits,
            kv_bits=scheme.kv_bits,
            activation_mode=scheme.activation_mode,
            kv_mode=scheme.kv_mode,
            companded=scheme.companded,
        )
        self.quantized: dict[str, QuantizedWeight] = {}
        self.weight_errors: dict[str, float] = {}
        self.targets: dict[str, Tensor] = {}
        self.simulated = replace(block, weights=dict(block.weights), biases=dict(block.biases))

    def _behind_norm(self, point: str, x: Tensor, floating: Tensor) -> Tensor:
        """`point` of "qkv" or "gate_up", of the streams of the quantized and of the float model."""
        read, wanted = (normed(self.float_block, self.shape, point, t) for t in (x, floating))
        return self.point(point, read, wanted)

    def _rows(self, x: Tensor) -> Tensor:
        """The tokens that count: x [n, T, ...] -> [N, ...]."""
        return x[self.counted]

    def _head_rows(self, x: Tensor) -> Tensor:
        """x [n, H, T, D] -> [H, N, D]."""
        return self._rows(x.transpose(1, 2)).transpose(0, 1).contiguous()

    def point(self, name: str, x: Tensor, wanted: Tensor) -> Tensor:
        """Searches the scale of an activation point, solves the weights that read it, and returns
        the quantized activations.

        Args:
            x: the point in the quantized model [n, T, K].
            wanted: the same point in the float model ("qkv", "gate_up"), or the outputs that lead
                to the float model's stream ("o", "down") [n, T, C].
        """
        weights = [self.float_block.weights[role] for role in POINTS[name]]
        if self.scheme.activation_bits < 16:
            self.scales.activations[name] = search_activation_scale(
                self._rows(x),
                weights,
                self.scheme.activation_bits,
                self.scheme.activation_mode,
                self.scheme.companded,
            )
        x = quantize_point(x, name, self.scales)
        if self.scheme.weight_bits < 16:
            rows = self._rows(x)
            hessian = rows.T @ rows / len(rows)
            if self.compensation:
                weights = self._compensated(name, weights, rows, hessian, self._rows(wanted))
            all_solved = self.solver(weights, self.scheme.weight_bits, hessian)
            for role, weight, solved in zip(POINTS[name], weights, all_solved, strict=True):
                self.quantized[role], self.targets[role] = solved, weight
                self.weight_errors[role] = layer_error(weight, solved, hessian).item()
                self.simulated.weights[role] = solved.dequantize(weight.dtype)
            if self.compensation and self.float_block.shifts:
                self._correct_biases(name, rows.mean(0), self._rows(wanted).mean(0))
        return x

    def _correct_biases(self, name: str, mean: Tensor, wanted: Tensor) -> None:
        """Makes the outputs right on average, for inputs of this mean."""
        for role in POINTS[name]:
            bias = self.float_block.biases[role]
            if name in ("qkv", "gate_up"):
                target = self.float_block.weights[role] @ wanted + bias
            else:
                target = wanted
            self.simulated.biases[role] = target - self.simulated.weights[role] @ mean

    def _compensated(
        self, name: str, weights: list[Tensor], rows: Tensor, hessian: Tensor, wanted: Tensor
    ) -> list[Tensor]:
        joint = torch.cat(weights)
        if name in ("qkv", "gate_up"):
            shortfall = input_shortfall(joint, wanted, rows, hessian)
        else:
            bias = self.float_block.biases[name]
            target = wanted if bias is None else wanted - bias
            shortfall = output_shortfall(joint, target, rows, hessian)
        moved = compensate(joint, hessian, shortfall, self.compensation)
        return list(moved.split([len(weight) for weight in weights]))

    def kv(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Searches the K and V scales and returns quantized k and v."""
        bits, mode, geometry = self.scheme.kv_bits, self.scheme.kv_mode, self.shape.geometry
        if bits == 16:
            return k, v
        queries = self._head_rows(q)
        logits = _grouped_metric(queries.transpose(1, 2) @ queries, geometry.kv_heads)
        out = rotate_last_dim(self.float_block.weights["o"], self.shape.r5_size, inverse=True)
        out = out.unflatten(-1, (geometry.heads, -1)).transpose(0, 1)
        outputs = _grouped_metric(out.transpose(1, 2) @ out, geometry.kv_heads)
        self.scales.k = search_head_scales(self._head_rows(k), logits, bits, mode)
        self.scales.v = search_head_scales(self._head_rows(v), outputs, bits, mode)
        if bits == 8:  # one scale a tensor at 8 bits: the largest of its heads
            self.scales.k = self.scales.k.amax().expand_as(self.scales.k).contiguous()
            self.scales.v = self.scales.v.amax().expand_as(self.scales.v).contiguous()
        k, v = (
            quantize_heads(t, s, bits, mode) for t, s in ((k, self.scales.k), (v, self.scales.v))
        )
        return k, v

    def run(self, x: Tensor, floating: FloatPass) -> Tensor:
        """Goes through the block once with the quantized stream x [n, T, C]; returns the stream
        after it."""
        block = self.simulated
        read = self._behind_norm("qkv", x, floating.entering)
        q, k, v = project_qkv(block, self.shape, read, self.rope)
        k, v = self.kv(q, k, v)
        mixed = torch.cat([attend(*part, self.prefix) for part in _batches(q, k, v)])
        mixed = rotate_last_dim(mixed, self.shape.r5_size)
        mixed = self.point("o", mixed, floating.middle - x)
        x = x + linear(block, "o", mixed)
        read = self._behind_norm("gate_up", x, floating.middle)
        inner = F.silu(linear(block, "gate", read)) * linear(block, "up", read)
        inner = rotate_last_dim(inner, self.shape.r4_size)
        inner = self.point("down", inner, floating.leaving - x)
        return x + linear(block, "down", inner)


def _float_pass(
    block: BlockWeights,
    shape: BlockShape,
    rope: tuple[Tensor, Tensor],
    prefix: PrefixKV,
    streams: Streams,
) -> FloatPass:
    x, start = streams.floating, 0
    middle, leaving = torch.empty_like(x), torch.empty_like(x)
    for part, mid, out in _batches(x, middle, leaving):
        tap = streams.counted.tap(slice(start, start + len(part)))
        mid.copy_(attention_half(block, shape, part, rope, prefix))
        out.copy_(mlp_half(block, shape, mid, tap=tap))
        start += len(part)
    return FloatPass(x, middle, leaving)


def calibrate_block(
    block: BlockWeights,
    shape: BlockShape,
    scheme: Scheme,
    rope: tuple[Tensor, Tensor],
    prefix: PrefixKV,
    streams: Streams,
    solver: WeightSolver = WeightSolver(),  # noqa: B008 - frozen
    compensation: float = COMPENSATION,
) -> CalibratedBlock:
    """Quantizes one block and advances both streams through it, in place.

    Args:
        block: rotated float weights.
        rope: cos, sin [T, D] of positions 0..T-1.
        prefix: K/V of the prefix in this block, never quantized.
        streams: inputs [n, T, C]; on return the block's outputs.
        solver: finds the integers and scales of the weights.
        compensation: the ``strength`` of `compensate`; 0 leaves the float weights as targets.
    """
    if streams.counted is None:
        x = streams.floating
        streams.counted = Counted(x.shape[:2], prefix.length, RecipeConfig().eta, x.device)
    floating = _float_pass(block, shape, rope, prefix, streams)
    counted = streams.counted.mask
    quantizer = _BlockQuantizer(block, shape, scheme, rope, prefix, solver, compensation, counted)
    streams.quantized.copy_(quantizer.run(streams.quantized, floating))
    streams.floating.copy_(floating.leaving)
    error = (streams.quantized - streams.floating).square().sum()
    return CalibratedBlock(
        quantizer.quantized,
        quantizer.scales,
        quantizer.simulated,
        (error / streams.floating.square().sum()).item(),
        quantizer.weight_errors,
        quantizer.targets,
    )
