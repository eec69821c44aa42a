# SPDX-License-Identifier: Apache-2.0
"""Dynamic symmetric quantization: every row (token) with a scale of its own."""

import torch
from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch, new_int8, new_row_scales


def _run_quantize_dynamic(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    q, scale = new_int8(x), new_row_scales(x)
    launch("quantize_dynamic", x, x=as_rows(x), bits=bits, clip=clip, q=q, scale=scale)
    return q, scale


def _empty_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2:
        raise ValueError(f"quantize_digits: x: expected 2 dimensions, got shape {list(x.shape)}")
    rows = 2 * x.shape[0]
    return (
        x.new_empty((rows, x.shape[1]), dtype=torch.int8),
        x.new_empty((rows,), dtype=torch.float32),
    )


def _run_quantize_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _empty_digits(x)
    rows = x.shape[0]

    def quantize(values: Tensor, own: slice) -> None:
        launch("quantize_dynamic", x, x=values, bits=8, clip=1.0, q=q[own], scale=scale[own])

    quantize(as_rows(x), slice(rows))
    rest = torch.addcmul(x, q[:rows], scale[:rows, None], value=-1.0)  # float32
    quantize(rest, slice(rows, None))
    return q, scale


_quantize_dynamic = define_on_every_device(
    "quantize_dynamic(Tensor x, int bits, float clip=1.0) -> (Tensor q, Tensor scale)",
    fake=lambda x, bits, clip=1.0: (new_int8(x), new_row_scales(x)),
    run=_run_quantize_dynamic,
)

_quantize_digits = define_on_every_device(
    "quantize_digits(Tensor x) -> (Tensor q, Tensor scale)",
    fake=_empty_digits,
    run=_run_quantize_digits,
)


def quantize_dynamic(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """``scale[r] = clip * max_c |x[r, c]| / qmax``, ``q = clamp(rint(x / scale))``.

    qmax = 2^(bits-1) - 1; a scale of 0 becomes 1. float32 arithmetic, ties to even, multiplied by
    1/scale, which is computed once a row. A NaN makes its row's scale NaN and its levels 0, an
    infinity makes the scale infinite and the levels 0.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides.
        bits: 2 to 8.
        clip: factor of the largest magnitude (learnable clipping), above 0.

    Returns:
        q int8, the shape of x, contiguous; scale float32 [rows], rows = x.numel() / C.

    Raises:
        ValueError: a wrong dtype, rank, ``bits`` or ``clip``.
    """
    return _quantize_dynamic(x, bits, clip)


def quantize_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as two int8 digits: ``q, s = quantize_dynamic(x, 8)``, then those of what is left of x.

    ::

        |x[t] - s[t] q[t] - s[T + t] q[T + t]| <= max|x[t]| / 64516        up to float32 rounding

    Args:
        x: float32, bfloat16 or float16 [T, C].

    Returns:
        q int8 [2 T, C], first the high digits; scale float32 [2 T].

    Raises:
        ValueError: a wrong dtype or rank.
    """
    return _quantize_digits(x)
