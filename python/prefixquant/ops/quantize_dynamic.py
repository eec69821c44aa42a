# SPDX-License-Identifier: Apache-2.0
"""Dynamic symmetric quantization: every row (token) with a scale of its own."""

from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch, new_int8, new_row_scales


def _run_quantize_dynamic(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    q, scale = new_int8(x), new_row_scales(x)
    launch("quantize_dynamic", x, x=as_rows(x), bits=bits, clip=clip, q=q, scale=scale)
    return q, scale


_quantize_dynamic = define_on_every_device(
    "quantize_dynamic(Tensor x, int bits, float clip=1.0) -> (Tensor q, Tensor scale)",
    fake=lambda x, bits, clip=1.0: (new_int8(x), new_row_scales(x)),
    run=_run_quantize_dynamic,
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
