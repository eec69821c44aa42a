# SPDX-License-Identifier: Apache-2.0
"""Small helpers of the row-wise operations."""

import math

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import on_device, stream_of


def as_rows(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where its leading dimensions do not share one stride.

    The kernels read rows at any one distance (a half of a gate-up tensor, say), so such views are
    passed on without a copy.
    """
    if x.is_contiguous() or x.dim() < 2:
        return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()
    if x.stride(-1) != 1:
        return x.contiguous()
    rows, stride = 1, 0
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != rows * stride:
            return x.contiguous()
        rows *= size
    return x


def new_int8(x: Tensor) -> Tensor:
    """An uninitialised, contiguous int8 tensor of x's shape."""
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


def new_levels(x: Tensor, packed: bool) -> Tensor:
    """Room for the levels of x: int8 of its shape, or packed uint8 [..., C/2]."""
    if not packed or x.dim() == 0:
        return new_int8(x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)


def new_row_scales(x: Tensor) -> Tensor:
    """Room for the scale of every row: float32 [rows]."""
    return x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32)


def launch(name: str, first: Tensor, **arguments) -> None:
    """Calls ``_C.<name>`` where `first` is: on the CPU, or on its device's current stream."""
    if first.is_cuda:
        with on_device(first):
            getattr(_C, f"{name}_cuda")(**arguments, stream=stream_of(first))
    else:
        getattr(_C, name)(**arguments)
