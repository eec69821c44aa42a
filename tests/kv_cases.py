# SPDX-License-Identifier: Apache-2.0
"""Caches of slots for the tests of the operations on them: contiguous or paged, poisoned."""

import torch
from torch import Tensor

# [Hq, Hkv, D]: GQA groups of 1, 3 and 8; head dimensions of SmolLM2, Llama, and odd ones.
HEADS = ((3, 1, 64), (8, 8, 128), (8, 1, 96), (2, 2, 10), (4, 2, 256), (6, 2, 80))


def new_cache(pages: int, kv_heads: int, page_size: int, dim: int, bits: int, dtype) -> Tensor:
    """[pages, Hkv, page_size, ..] whose every value is large (NaN at 16 bits)."""
    if bits == 16:
        return torch.full((pages, kv_heads, page_size, dim), float("nan"), dtype=dtype)
    width = dim // 2 if bits == 4 else dim
    cache = torch.full((pages, kv_heads, page_size, width), 0x77, dtype=torch.uint8)
    return cache if bits == 4 else cache.view(torch.int8)


def fill(cache: Tensor, page: int, rows: slice, scale: float = 1.0) -> None:
    """Random values into rows of a page."""
    part = cache[page, :, rows]
    if cache.is_floating_point():
        part.copy_(torch.randn(part.shape) * scale)
    else:
        part.copy_(torch.randint(0, 256, part.shape).byte().view(cache.dtype))


def filled_cache(
    lengths: list[int],
    kv_heads: int,
    dim: int,
    bits: int,
    dtype: torch.dtype,
    page_size: int | None = None,
    capacity: int = 90,
) -> tuple[Tensor, Tensor, Tensor | None, list[list[int]]]:
    """(k_cache, v_cache, block_table or None, the pages of every sequence) with random rows.

    Paged: the pages of all sequences in a random order with unused ones between, and absurd page
    numbers in the entries of the table that no row needs.
    """
    if page_size is None:
        pages = [[b] for b in range(len(lengths))]
        k, v = (new_cache(len(lengths), kv_heads, capacity, dim, bits, dtype) for _ in range(2))
        for cache in (k, v):
            for b, length in enumerate(lengths):
                fill(cache, b, slice(0, length))
        return k, v, None, pages
    needed = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(needed) + 3).tolist()
    k, v = (new_cache(len(order), kv_heads, page_size, dim, bits, dtype) for _ in range(2))
    table = torch.full((len(lengths), max(needed, default=0) + 2), -(2**31), dtype=torch.int32)
    table[:, -1] = 2**31 - 1
    pages = []
    for b, length in enumerate(lengths):
        mine, order = order[: needed[b]], order[needed[b] :]
        pages.append(mine)
        table[b, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for i, page in enumerate(mine):
            for cache in (k, v):
                fill(cache, page, slice(0, min(page_size, length - i * page_size)))
    return k, v, table, pages


def cache_scales(kv_heads: int, bits: int) -> Tensor | None:
    """Scales that make the values of a cache about 1."""
    return None if bits == 16 else (torch.rand(kv_heads) + 0.5) / 2 ** (bits - 1)


def rope_tables(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos().float(), angles.sin().float()
