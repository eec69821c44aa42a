# SPDX-License-Identifier: Apache-2.0
"""RMSNorm fused with the static quantization of its output."""

from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define
from prefixquant.ops._rows import as_rows, new_int8


def _rmsnorm_quantize_cpu(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor, bits: int
) -> Tensor:
    q = new_int8(x)
    _C.rmsnorm_quantize(x=as_rows(x), weight=weight, eps=eps, scale=scale, bits=bits, q=q)
    return q


_rmsnorm_quantize = define(
    "rmsnorm_quantize(Tensor x, Tensor? weight, float eps, Tensor scale, int bits) -> Tensor",
    fake=lambda x, weight, eps, scale, bits: new_int8(x),
    cpu=_rmsnorm_quantize_cpu,
)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor, bits: int
) -> Tensor:
    """``quantize_static((x * rstd) * weight)``, ``rstd = float32(1 / sqrt(mean(x^2) + eps))``.

    The mean and rstd are taken in float64, the two products in float32, each rounded.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides.
        weight: floating [C], contiguous, or None where it is folded into the next linear.
        eps: 0 or more.
        scale: float32 [] (no dimension), above 0.
        bits: 2 to 8.

    Returns:
        int8, the shape of x, contiguous.

    Raises:
        ValueError: a wrong dtype, rank, size, ``eps`` or ``bits``.
    """
    return _rmsnorm_quantize(x, weight, eps, scale, bits)
