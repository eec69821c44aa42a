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
    computes v again from x, so only x and s are kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bits = bits
        return quantize(x, scale, bits).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        qmin, qmax = qrange(ctx.bits)
        v = x.float() * (1.0 / scale)
        rounded = v.round()
        q = rounded.clamp(qmin, qmax)
        grad = grad.float()
        passed = grad * (rounded == q)
        grad_x = passed.to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        grad_scale = q.mul_(grad).sub_(v.mul_(passed)).sum_to_size(scale.shape)
        return grad_x, grad_scale, None


@functools.cache
def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype for products that need no float32: bfloat16 where the device multiplies it faster.

    A bfloat16 value errs by 0.4 percent. That is little beside outliers of 64 medians, beside the
    errors that a scale search compares (sums over thousands of products), and beside 4-bit keys.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type != "cpu" or supported() else torch.float32
