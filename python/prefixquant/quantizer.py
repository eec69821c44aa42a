# SPDX-License-Identifier: Apache-2.0
"""The symmetric quantizer, in float32 torch: the same expression as the CPU and CUDA kernels."""

import functools

import torch
from torch import Tensor


def qrange(bits: int) -> tuple[int, int]:
    """The integers of a signed ``bits``-bit value: -2^(b-1) and 2^(b-1) - 1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def minmax_scale(max_abs: Tensor, bits: int) -> Tensor:
    """``2 max|x| / (2^b - 1)``: the scale that covers the range, kept above zero."""
    return (2.0 * max_abs.float() / (2**bits - 1)).clamp_min(1e-12)


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``q = clamp(rint(x * (1/s)), qmin, qmax)``, float32, round half to even."""
    qmin, qmax = qrange(bits)
    return (x.float() * (1.0 / scale)).round_().clamp_(qmin, qmax)


def fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``quantize(x) * s`` in the dtype of x; differentiable in both (`_StraightThrough`)."""
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _StraightThrough.apply(x, scale, bits)
    return quantize(x, scale, bits).mul_(scale).to(x.dtype)


def fake_quantize_dynamic(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Fake quantization of each row (last dimension) of x with a scale of its own.

    ``s = clip * max|x| / (2^(b-1) - 1)`` of the row, 1 where that is 0, as `ops.quantize_dynamic`;
    differentiable in x and clip, the maximum taken as given.

    Args:
        clip: float32, above 0; broadcasts against the rows' maxima [.., 1].
    """
    scale = clip * x.detach().abs().amax(-1, keepdim=True).float() / qrange(bits)[1]
    return fake_quantize(x, torch.where(scale == 0, 1.0, scale), bits)


class _StraightThrough(torch.autograd.Function):
    """Fake quantization with the gradients of LSQ (Esser et al., arXiv 1902.08153, equations 3, 5).

    With v = x/s and q = clamp(rint(v)), rounding counts as the identity:

        d x_hat / d x = 1 where rint(v) is in range, else 0
        d x_hat / d s = q - v where rint(v) is in range, else q

    No factor is put on the scale's gradient: Adam divides by its size anyway. The backward pass
    rounds x again, so only x and s are kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bits = bits
        return _rounded(x, scale, bits)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        rounded, inside = _rounded(x.float(), scale, ctx.bits)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        by_scale = rounded.sub_(x * inside).mul_(grad)  # times s
        return grad_x, by_scale.sum_to_size(scale.shape) / scale, None


def _rounded(x: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(``quantize(x) * s`` in the dtype of x, where rint(x/s) is in range)."""
    # On a CPU torch's operations below take four times as long as these.
    found = _rounded_at_once(x, scale, bits) if x.is_cuda else None
    if found is not None:
        return found
    steps = (x.float() * (1.0 / scale)).round_()
    q = steps.clamp(*qrange(bits))
    return (q * scale).to(x.dtype), steps == q


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
