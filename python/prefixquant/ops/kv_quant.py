# SPDX-License-Identifier: Apache-2.0
"""Quantized keys and values: 4 bits packed or 8 bits, one static scale a head."""

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define


def _quantized(x: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=torch.int8)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def _kv_quantize_cpu(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    shift: Tensor | None = None,
) -> Tensor:
    q = _quantized(x, bits)
    _C.kv_quantize(
        x=_last_contiguous(x),
        scale=scale,
        bits=bits,
        signs=signs,
        block_size=block_size,
        shift=shift,
        q=q,
    )
    return q


def _kv_append_cpu(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    cache: Tensor,
    position: int,
    shift: Tensor | None = None,
) -> None:
    _C.kv_append(
        x=_last_contiguous(x),
        scale=scale,
        bits=bits,
        signs=signs,
        block_size=block_size,
        shift=shift,
        cache=cache,
        position=position,
    )


def _dequantized(q: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    dim = q.shape[-1] * 2 if bits == 4 else q.shape[-1]
    return q.new_empty((*q.shape[:-1], dim), dtype=dtype)


def _kv_dequantize_cpu(q: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    y = _dequantized(q, bits, dtype)
    _C.kv_dequantize(q=_last_contiguous(q), scale=scale, bits=bits, y=y)
    return y


_kv_quantize = define(
    "kv_quantize(Tensor x, Tensor scale, int bits, Tensor? signs, int block_size, "
    "Tensor? shift=None) -> Tensor",
    fake=lambda x, scale, bits, signs, block_size, shift=None: _quantized(x, bits),
    cpu=_kv_quantize_cpu,
)
_kv_append = define(
    "kv_append(Tensor x, Tensor scale, int bits, Tensor? signs, int block_size, "
    "Tensor(a!) cache, int position, Tensor? shift=None) -> ()",
    fake=lambda x, scale, bits, signs, block_size, cache, position, shift=None: None,
    cpu=_kv_append_cpu,
)
_kv_dequantize = define(
    "kv_dequantize(Tensor q, Tensor scale, int bits, ScalarType dtype) -> Tensor",
    fake=lambda q, scale, bits, dtype: _dequantized(q, bits, dtype),
    cpu=_kv_dequantize_cpu,
)


def kv_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None = None,
    block_size: int = 1,
    shift: Tensor | None = None,
) -> Tensor:
    """``q = clamp(rint((H x - shift[h]) * (1/scale[h])))`` for keys or values, packed when ``bits``
    is 4.

    Args:
        x: float32, bfloat16 or float16 [B, H, T, D], any strides.
        scale: float32 [H].
        bits: 4 or 8.
        signs, block_size: the Hadamard over D as for `hadamard`, block_size = D; 1 leaves it out.
        shift: float32 [H, D]; None: nothing is subtracted.

    Returns:
        uint8 [B, H, T, D/2], low nibble = even index, for 4 bits; int8 [B, H, T, D] for 8.

    Raises:
        ValueError: a wrong dtype, rank, size, sign or ``bits``.
    """
    return _kv_quantize(x, scale, bits, signs, block_size, shift)


def kv_append(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    cache: Tensor,
    position: int,
    shift: Tensor | None = None,
) -> None:
    """``cache[:, :, position : position + T] = kv_quantize(x, ...)``, in place.

    Args:
        x, scale, bits, signs, block_size, shift: as for `kv_quantize`.
        cache: uint8 [B, H, S, D/2] or int8 [B, H, S, D], the last dimension contiguous.
        position: the first row written; position + T <= S.

    Raises:
        ValueError: a wrong dtype, rank, size, sign, ``bits`` or ``position``.
    """
    _kv_append(x, scale, bits, signs, block_size, cache, position, shift)


def kv_dequantize(q: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``y = float32(q) * scale[h]``, rounded to ``dtype``; the inverse of `kv_quantize`.

    Args:
        q: uint8 [B, H, T, D/2] for 4 bits, int8 [B, H, T, D] for 8; any strides.
        scale: float32 [H].
        bits: 4 or 8.
        dtype: torch.float32, bfloat16 or float16.

    Returns:
        [B, H, T, D] of ``dtype``, contiguous; still rotated when a Hadamard was applied.

    Raises:
        ValueError: a wrong dtype, rank, size or ``bits``.
    """
    return _kv_dequantize(q, scale, bits, dtype)
