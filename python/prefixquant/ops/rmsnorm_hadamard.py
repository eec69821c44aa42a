# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, the Hadamard transform of a whole row and the quantization as one operation: R6."""

from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch, new_int8


def _run_rmsnorm_hadamard_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    signs: Tensor | None,
    scale: Tensor,
    bits: int,
    shift: Tensor | None = None,
) -> Tensor:
    q = new_int8(x)
    launch(
        "rmsnorm_hadamard_quantize",
        x,
        x=as_rows(x),
        weight=weight,
        eps=eps,
        signs=signs,
        scale=scale,
        bits=bits,
        shift=shift,
        q=q,
    )
    return q


_rmsnorm_hadamard_quantize = define_on_every_device(
    "rmsnorm_hadamard_quantize(Tensor x, Tensor? weight, float eps, Tensor? signs, Tensor scale, "
    "int bits, Tensor? shift=None) -> Tensor",
    fake=lambda x, weight, eps, signs, scale, bits, shift=None: new_int8(x),
    run=_run_rmsnorm_hadamard_quantize,
)


def rmsnorm_hadamard_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    signs: Tensor | None,
    scale: Tensor,
    bits: int,
    shift: Tensor | None = None,
) -> Tensor:
    """``quantize_static(hadamard(x * weight) * rstd - shift)``,
    ``rstd = float32(1 / sqrt(mean(x^2) + eps))``.

    The transform is `hadamard`'s with the whole row as its block, C = 2^m k, and is not rounded to
    the dtype of x. The mean and rstd are taken in float64, the rest in float32: each product and
    the difference are rounded. rstd comes behind the transform, which is linear, so that a row is
    read once.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides.
        weight: floating [C], contiguous, its dtype independent of the others', or None: no weight.
        eps: 0 or more.
        signs: int8 [k, k] of 1 and -1, 4 divides k; None for k = 1.
            `prefixquant.hadamard.split_size` gives k and `hadamard_signs` the signs.
        scale: float32 [] (no dimension), above 0.
        bits: 2 to 8.
        shift: floating [C], contiguous, its dtype independent of the others', or None: no shift.
            A static mean of what the transform gives, as for `rmsnorm_quantize`.

    Returns:
        int8, the shape of x, contiguous.

    Raises:
        ValueError: a wrong dtype, rank, size, sign, ``eps`` or ``bits``.
    """
    return _rmsnorm_hadamard_quantize(x, weight, eps, signs, scale, bits, shift)
