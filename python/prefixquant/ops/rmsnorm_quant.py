# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, alone or fused with the residual addition before it and the quantization after it."""

import torch
from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch, new_int8, new_levels, new_row_scales


def _run_rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch("rmsnorm", x, x=as_rows(x), weight=weight, eps=eps, y=y)
    return y


def _run_rmsnorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    packed: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    q = new_levels(x, packed)
    launch(
        "rmsnorm_quantize",
        x,
        x=as_rows(x),
        weight=weight,
        eps=eps,
        scale=scale,
        bits=bits,
        q=q,
        shift=shift,
    )
    return q


def _run_add_rmsnorm_quantize(
    residual: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    packed: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    q = new_levels(x, packed)
    rows = as_rows(residual)
    launch(
        "add_rmsnorm_quantize",
        x,
        residual=rows,
        x=as_rows(x),
        weight=weight,
        eps=eps,
        scale=scale,
        bits=bits,
        q=q,
        shift=shift,
    )
    if rows is not residual:
        residual.copy_(rows)
    return q


def _run_rmsnorm_quantize_dynamic(
    x: Tensor, weight: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    q, scale = new_int8(x), new_row_scales(x)
    launch(
        "rmsnorm_quantize_dynamic",
        x,
        x=as_rows(x),
        weight=weight,
        eps=eps,
        bits=bits,
        q=q,
        scale=scale,
    )
    return q, scale


_rmsnorm = define_on_every_device(
    "rmsnorm(Tensor x, Tensor? weight, float eps) -> Tensor",
    fake=lambda x, weight, eps: x.new_empty(x.shape),
    run=_run_rmsnorm,
)
_rmsnorm_quantize = define_on_every_device(
    "rmsnorm_quantize(Tensor x, Tensor? weight, float eps, Tensor scale, int bits, "
    "bool packed=False, Tensor? shift=None) -> Tensor",
    fake=lambda x, weight, eps, scale, bits, packed=False, shift=None: new_levels(x, packed),
    run=_run_rmsnorm_quantize,
)
_add_rmsnorm_quantize = define_on_every_device(
    "add_rmsnorm_quantize(Tensor(a!) residual, Tensor x, Tensor? weight, float eps, Tensor scale, "
    "int bits, bool packed=False, Tensor? shift=None) -> Tensor",
    fake=lambda residual, x, weight, eps, scale, bits, packed=False, shift=None: new_levels(
        x, packed
    ),
    run=_run_add_rmsnorm_quantize,
)
_rmsnorm_quantize_dynamic = define_on_every_device(
    "rmsnorm_quantize_dynamic(Tensor x, Tensor? weight, float eps, int bits) "
    "-> (Tensor q, Tensor scale)",
    fake=lambda x, weight, eps, bits: (new_int8(x), new_row_scales(x)),
    run=_run_rmsnorm_quantize_dynamic,
)


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``(x * rstd) * weight``, ``rstd = float32(1 / sqrt(mean(x^2) + eps))``.

    The mean and rstd are taken in float64, the two products in float32, each rounded, and the
    result is rounded once to the dtype of x.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides.
        weight: floating [C], contiguous, or None where it is folded into the next linear.
        eps: 0 or more.

    Returns:
        The dtype and shape of x, contiguous.

    Raises:
        ValueError: a wrong dtype, rank, size or ``eps``.
    """
    return _rmsnorm(x, weight, eps)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    packed: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """``quantize_static((x * rstd) * weight - shift)``,
    ``rstd = float32(1 / sqrt(mean(x^2) + eps))``.

    The mean and rstd are taken in float64, the two products and the difference in float32, each
    rounded.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides.
        weight: floating [C], contiguous, or None where it is folded into the next linear.
        eps: 0 or more.
        scale: float32 [] (no dimension), above 0.
        bits: 2 to 8.
        packed: two values a byte, as `pack_int4`; needs an even C and at most 4 bits.
        shift: floating [C], contiguous, its dtype independent of the others', or None: no shift. A
            static mean of the activations is left out of the levels and comes back in the bias of
            the next linear.

    Returns:
        int8, the shape of x, contiguous; packed uint8 [..., C/2].

    Raises:
        ValueError: a wrong dtype, rank, size, ``eps`` or ``bits``.
    """
    return _rmsnorm_quantize(x, weight, eps, scale, bits, packed, shift)


def add_rmsnorm_quantize(
    residual: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    packed: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """``residual += x``, rounded to its dtype, then ``rmsnorm_quantize(residual, ...)``.

    Args:
        residual: float32, bfloat16 or float16 [..., C], any strides; written in place.
        x: the dtype and shape of residual, any strides.
        weight, eps, scale, bits, packed, shift: as for `rmsnorm_quantize`.

    Returns:
        As `rmsnorm_quantize`.

    Raises:
        ValueError: a wrong dtype, rank, size, ``eps`` or ``bits``.
    """
    return _add_rmsnorm_quantize(residual, x, weight, eps, scale, bits, packed, shift)


def rmsnorm_quantize_dynamic(
    x: Tensor, weight: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    """``quantize_dynamic((x * rstd) * weight)``, the norm in float32 and not rounded in between.

    Args:
        x, weight, eps: as for `rmsnorm_quantize`.
        bits: 2 to 8.

    Returns:
        q int8, the shape of x, contiguous; scale float32 [rows], rows = x.numel() / C.

    Raises:
        ValueError: a wrong dtype, rank, size, ``eps`` or ``bits``.
    """
    return _rmsnorm_quantize_dynamic(x, weight, eps, bits)
