# SPDX-License-Identifier: Apache-2.0
"""The symmetric quantizer, in float32 torch: the same expression as the CPU and CUDA kernels."""

import functools
import math

import torch
from torch import Tensor

from prefixquant.config import container_bits

# The sixteen levels of a companded 4-bit value are these and their negatives, in units of a scale.
# About ``126 sinh(2t) / sinh(2)`` for t = 1/15, 3/15 .. 1: close together where values are dense.
# What lies half-way between two of them is no integer.
COMPANDED_LEVELS = (5, 14, 25, 38, 53, 72, 95, 126)


def qrange(bits: int) -> tuple[int, int]:
    """The integers of a signed ``bits``-bit value: -2^(b-1) and 2^(b-1) - 1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def minmax_scale(max_abs: Tensor, bits: int, companded: bool = False) -> Tensor:
    """``2 max|x| / (2^b - 1)``: the scale that covers the range, kept above zero."""
    return (2.0 * max_abs.float() / (2 ** container_bits(bits, companded) - 1)).clamp_min(1e-12)


def quantize(x: Tensor, scale: Tensor, bits: int, companded: bool = False) -> Tensor:
    """``q = clamp(rint(x * (1/s)), qmin, qmax)``, float32, round half to even.

    Companded, ``compand(q)`` of the 8-bit q: one of 16 levels that are not evenly spaced.
    """
    qmin, qmax = qrange(container_bits(bits, companded))
    q = (x.float() * (1.0 / scale)).round_().clamp_(qmin, qmax)
    return compand(q) if companded else q


def compand(q: Tensor) -> Tensor:
    """The nearest of the sixteen levels, +- `COMPANDED_LEVELS`, of integers from -128 to 127; 0
    becomes the smallest positive one, NaN any of them."""
    table = _companding_table(q.device)
    index = (q + 128).to(torch.int32).clamp_(0, 255)
    return table.index_select(0, index.flatten()).view(q.shape)


@functools.cache
def _companding_table(device: torch.device) -> Tensor:
    """float32 [256], the level of -128 .. 127."""
    nearest = [
        min(COMPANDED_LEVELS, key=lambda level: abs(level - abs(q))) for q in range(-128, 128)
    ]
    signed = (math.copysign(level, q) for level, q in zip(nearest, range(-128, 128), strict=True))
    return torch.tensor(list(signed), dtype=torch.float32, device=device)


def fake_quantize(x: Tensor, scale: Tensor, bits: int, companded: bool = False) -> Tensor:
    """``quantize(x) * s`` in the dtype of x; differentiable in both (`_StraightThrough`)."""
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _StraightThrough.apply(x, scale, bits, companded)
    return quantize(x, scale, bits, companded).mul_(scale).to(x.dtype)


def fake_quantize_dynamic(x: Tensor, clip: Tensor, bits: int, companded: bool = False) -> Tensor:
    """Fake quantization of each row (last dimension) of x with a scale of its own.

    ``s = clip * max|x| / (2^(b-1) - 1)`` of the row, 1 where that is 0, as `ops.quantize_dynamic`
    (companded: with b = 8); differentiable in x and clip, the maximum taken as given.

    Args:
        clip: float32, above 0; broadcasts against the rows' maxima [.., 1].
    """
    largest = x.detach().abs().amax(-1, keepdim=True).float()
    scale = clip * largest / qrange(container_bits(bits, companded))[1]
    return fake_quantize(x, torch.where(scale == 0, 1.0, scale), bits, companded)


class _StraightThrough(torch.autograd.Function):
    """Fake quantization with the gradients of LSQ (Esser et al., arXiv 1902.08153, equations 3, 5).

    With v = x/s and q = clamp(rint(v)), rounding counts as the identity:

        d x_hat / d x = 1 where rint(v) is in range, else 0
        d x_hat / d s = q - v where rint(v) is in range, else q

    No factor is put on the scale's gradient: Adam divides by its size anyway. The backward pass
    rounds x again, so only x and s are kept. Companded levels go by the same formulas, the range
    that of 8 bits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bits: int, companded: bool) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.levels = bits, companded
        return _rounded(x, scale, bits, companded)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        rounded, inside = _rounded(x.float(), scale, *ctx.levels)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        by_scale = rounded.sub_(x * inside).mul_(grad)  # times s
        return grad_x, by_scale.sum_to_size(scale.shape) / scale, None, None


def _rounded(x: Tensor, scale: Tensor, bits: int, companded: bool = False) -> tuple[Tensor, Tensor]:
    """(``quantize(x) * s`` in the dtype of x, where rint(x/s) is in range)."""
    # On a CPU what does it at once takes four to eight times as long as these operations.
    if x.is_cuda:
        found = _companded_at_once(x, scale) if companded else _rounded_at_once(x, scale, bits)
        if found is not None:
            return found
    steps = (x.float() * (1.0 / scale)).round_()
    q = steps.clamp(*qrange(container_bits(bits, companded)))
    inside = steps == q
    return ((compand(q) if companded else q) * scale).to(x.dtype), inside


def _rounded_at_once(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """`_rounded` in one pass, by torch's operations of quantization-aware training, where there is
    one scale or one a channel; the same bits. Neither waits for the device."""
    levels = qrange(bits)
    if scale.numel() == 1:
        zero, on = _switches(x.device)
        return torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
            x, scale.reshape(1), zero, on, *levels
        )
    wide = [dim for dim in range(-scale.dim(), 0) if scale.shape[dim] > 1]
    if len(wide) > 1:
        return None
    channels = scale.reshape(-1).contiguous()
    zeros = torch.zeros_like(channels)  # floating: integers would be read back to be checked
    return torch.ops.aten.fake_quantize_per_channel_affine_cachemask(
        x, channels, zeros, x.dim() + wide[0], *levels
    )


def _companded_at_once(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`_rounded` of companded levels in half as many passes; the same bits."""
    bounds, levels = _companding_cells(x.device)
    steps = x.float() * (1.0 / scale)
    cells = torch.bucketize(steps, bounds, out_int32=True).flatten()
    if scale.numel() == 1:
        rounded = (levels * scale.reshape(1)).index_select(0, cells).view(steps.shape)
    else:
        rounded = levels.index_select(0, cells).view(steps.shape) * scale
    low, high = qrange(8)
    return rounded.to(x.dtype), (steps >= low - 0.5) & (steps < high + 0.5)


@functools.cache
def _companding_cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [15] and [16]: the largest values that round to integers of the first 15 levels, half
    to even, and the levels."""
    table = _companding_table(torch.device("cpu"))
    last = [q for q in range(-128, 127) if table[q + 128] != table[q + 129]]
    halves = torch.tensor([q + 0.5 for q in last])
    even = torch.tensor([q % 2 == 0 for q in last])
    bounds = torch.where(even, halves, halves.nextafter(torch.tensor(-torch.inf)))
    return bounds.to(device), table.unique().to(device)


@functools.cache
def _switches(device: torch.device) -> tuple[Tensor, Tensor]:
    """No zero point, and fake quantization switched on, as torch's operation reads them."""
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return zero, torch.ones(1, dtype=torch.int64, device=device)


@functools.cache
def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype for products that need no float32: bfloat16 where the device multiplies it faster.

    A bfloat16 value errs by 0.4 percent. That is little beside outliers of 64 medians, beside the
    errors that a scale search compares (sums over thousands of products), and beside 4-bit keys.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type != "cpu" or supported() else torch.float32
