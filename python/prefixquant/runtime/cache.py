# SPDX-License-Identifier: Apache-2.0
"""The static KV cache: all its memory is taken at once and stays where it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.roles import Geometry


@dataclass(frozen=True)
class StaticCache:
    """Keys and values of every layer: [batch, Hkv, capacity, D], packed, int8 or 16-bit.

    Sequence b owns page b; its token at position t lies in row t. The prefix is not in the cache.
    """

    keys: list[Tensor]
    values: list[Tensor]
    batch: int
    capacity: int

    @classmethod
    def allocate(
        cls,
        geometry: Geometry,
        kv_bits: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "StaticCache":
        """Zeroed memory for ``batch`` sequences of ``capacity`` tokens; ``dtype`` at 16 bits."""
        width, storage = {
            4: (geometry.head_dim // 2, torch.uint8),
            8: (geometry.head_dim, torch.int8),
            16: (geometry.head_dim, dtype),
        }[kv_bits]
        shape = (batch, geometry.kv_heads, capacity, width)

        def layers() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=storage, device=device) for _ in range(geometry.layers)
            ]

        return cls(layers(), layers(), batch, capacity)

    def slots(self, sequence: int, start: int, tokens: int) -> range:
        """Where rows start .. start + tokens - 1 of a sequence lie."""
        first = sequence * self.capacity + start
        return range(first, first + tokens)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))
