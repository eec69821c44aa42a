# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of the operations, one by one)
"""The CUDA implementations of what writes a KV cache, and reads it back as floats."""

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import implement, on_device, stream_of
from prefixquant.ops.kv_quant import _dequantized, _last_contiguous, _quantized


def _write(
    op: str,
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    shift: Tensor | None,
    cache: Tensor,
    position: int,
) -> None:
    with on_device(x):
        _C.kv_quantize_cuda(
            op=op,
            x=_last_contiguous(x),
            scale=scale,
            bits=bits,
            signs=signs,
            block_size=block_size,
            shift=shift,
            cache=cache,
            position=position,
            stream=stream_of(x),
        )


def _kv_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    shift: Tensor | None = None,
) -> Tensor:
    q = _quantized(x, bits)
    _write("kv_quantize", x, scale, bits, signs, block_size, shift, q, 0)
    return q


def _kv_append(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None,
    block_size: int,
    cache: Tensor,
    position: int,
    shift: Tensor | None = None,
) -> None:
    _write("kv_append", x, scale, bits, signs, block_size, shift, cache, position)


def dequantized_rows(
    cache: Tensor, scale: Tensor | None, y: Tensor, block_table: Tensor | None = None
) -> None:
    """The first T rows of each sequence of a cache into y [B, H, T, D] of any strides.

    The cache is [pages, H, page_size, D or D/2]; sequence b lies in page b or, where there is a
    block_table int32 [B, pages of a sequence], in those pages. A 16-bit cache is converted.
    """
    if cache.dtype not in (torch.uint8, torch.int8) and cache.dtype != y.dtype:
        same = torch.empty_like(y, dtype=cache.dtype)
        dequantized_rows(cache, scale, same, block_table)
        y.copy_(same)
        return
    bits = {torch.uint8: 4, torch.int8: 8}.get(cache.dtype, 16)
    with on_device(y):
        _C.kv_dequantize_cuda(
            q=_last_contiguous(cache),
            scale=scale,
            bits=bits,
            block_table=block_table,
            y=y,
            stream=stream_of(y),
        )


def _kv_dequantize(q: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    y = _dequantized(q, bits, dtype)
    with on_device(q):
        _C.kv_dequantize_cuda(
            q=_last_contiguous(q),
            scale=scale,
            bits=bits,
            block_table=None,
            y=y,
            stream=stream_of(q),
        )
    return y


implement("kv_quantize", _kv_quantize)
implement("kv_append", _kv_append)
implement("kv_dequantize", _kv_dequantize)
