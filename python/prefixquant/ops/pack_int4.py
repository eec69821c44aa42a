# SPDX-License-Identifier: Apache-2.0
"""The canonical packed int4 layout: two values a byte, even index in the low nibble."""

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define


def _pack_cpu(q: Tensor) -> Tensor:
    q = q.contiguous()
    packed = q.new_empty((*q.shape[:-1], q.shape[-1] // 2), dtype=torch.uint8)
    _C.pack_int4(q=q, packed=packed)
    return packed


def _unpack_cpu(packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    q = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=torch.int8)
    _C.unpack_int4(packed=packed, q=q)
    return q


_pack_int4 = define(
    "pack_int4(Tensor q) -> Tensor",
    fake=lambda q: q.new_empty((*q.shape[:-1], q.shape[-1] // 2), dtype=torch.uint8),
    cpu=_pack_cpu,
)
_unpack_int4 = define(
    "unpack_int4(Tensor packed) -> Tensor",
    fake=lambda packed: packed.new_empty(
        (*packed.shape[:-1], packed.shape[-1] * 2), dtype=torch.int8
    ),
    cpu=_unpack_cpu,
)


def pack_int4(q: Tensor) -> Tensor:
    """``packed[..., i] = (q[..., 2i] & 15) | (q[..., 2i+1] & 15) << 4``.

    Args:
        q: int8 [..., K], K even, values in [-8, 7].

    Returns:
        uint8 [..., K/2].

    Raises:
        ValueError: wrong dtype, odd K, or a value outside [-8, 7].
    """
    return _pack_int4(q)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: uint8 [..., K/2] -> int8 [..., K] with values in [-8, 7].

    Raises:
        ValueError: wrong dtype.
    """
    return _unpack_int4(packed)
