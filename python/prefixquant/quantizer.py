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
    """``quantize(x) * s`` in the dtype of x."""
    return quantize(x, scale, bits).mul_(scale).to(x.dtype)


@functools.cache
def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype for products that need no float32: bfloat16 where the device multiplies it faster.

    A bfloat16 value errs by 0.4 percent. That is little beside outliers of 64 medians, beside the
    errors that a scale search compares (sums over thousands of products), and beside 4-bit keys.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type != "cpu" or supported() else torch.float32
