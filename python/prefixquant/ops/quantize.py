# SPDX-License-Identifier: Apache-2.0
"""Static symmetric quantization of activations."""

from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch, new_int8


def _run_quantize_static(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    q = new_int8(x)
    launch("quantize_static", x, x=as_rows(x), scale=scale, bits=bits, q=q)
    return q


_quantize_static = define_on_every_device(
    "quantize_static(Tensor x, Tensor scale, int bits) -> Tensor",
    fake=lambda x, scale, bits: new_int8(x),
    run=_run_quantize_static,
)


def quantize_static(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``q = clamp(rint(x * (1/scale)), -2^(bits-1), 2^(bits-1) - 1)``.

    float32 arithmetic, ties to even, 1/scale computed once; NaN gives 0, infinities clamp.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides.
        scale: float32 [] (no dimension), above 0.
        bits: 2 to 8.

    Returns:
        int8, the shape of x, contiguous.

    Raises:
        ValueError: a wrong dtype, rank or ``bits``.
    """
    return _quantize_static(x, scale, bits)
