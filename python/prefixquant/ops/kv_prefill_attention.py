# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of attention over a cache, one by one)
"""Causal attention of the new tokens of sequences over the prefix and the cached rows."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define
from prefixquant.ops.kv_decode_attention import empty_output
from prefixquant.ops.kv_quant import kv_dequantize
from prefixquant.ops.quantize import quantize_static
from prefixquant.quantizer import matmul_dtype

# Up to this many query tokens the cache is read as it is; beyond, unpacking it once and using
# matrix products is faster. Those run in bfloat16 where the CPU has it: at 512 tokens and 9 heads
# of 64, 2.0 ms against 5.5 in float32 (one core with AMX).
_PACKED_QUERY_TOKENS = 16
# Queries that attend together: later keys than those of the last one are not touched.
_QUERY_CHUNK = 512


class KvPrefillAttentionArguments(NamedTuple):
    """The arguments of the operation, in the order of its schema."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    prefix_k: Tensor
    prefix_v: Tensor
    kv_bits: int
    starts: list[int]
    counts: list[int]
    scaling: float
    sequence: int
    block_table: Tensor | None
    output_scale: Tensor | None
    output_bits: int


def check_counts(q: Tensor, starts: list[int], counts: list[int]) -> None:
    """The queries must divide into segments of so many tokens."""
    if not counts or min(counts) < 0 or sum(counts) != q.shape[0]:
        raise ValueError(
            "kv_prefill_attention: counts: expected numbers of 0 or more that sum to the "
            f"{q.shape[0]} rows of q, got {counts}"
        )
    if len(starts) != len(counts):
        raise ValueError(
            f"kv_prefill_attention: start: expected one, or one for each of the {len(counts)} "
            f"sequences, got {starts}"
        )


def _kv_prefill_attention_fake(*arguments) -> Tensor:
    a = KvPrefillAttentionArguments(*arguments)
    return empty_output(a.q, a.output_scale)


def _kv_prefill_attention_cpu(*arguments) -> Tensor:
    a = KvPrefillAttentionArguments(*arguments)
    out = empty_output(a.q)
    check_counts(a.q, a.starts, a.counts)
    pieces = zip(a.q.split(a.counts), out.split(a.counts), a.starts, strict=True)
    for index, (q, own, start) in enumerate(pieces):
        _attend_sequence(a, q, start, a.sequence + index, own)
    return out if a.output_scale is None else quantize_static(out, a.output_scale, a.output_bits)


def _attend_sequence(
    a: KvPrefillAttentionArguments, q: Tensor, start: int, sequence: int, out: Tensor
) -> None:
    """q [T, Hq, D] -> out [T, Hq * D]"""
    # With more tokens the kernel gets none of them: then it only checks the arguments.
    packed = q.shape[0] if q.shape[0] <= _PACKED_QUERY_TOKENS else 0
    _C.kv_prefill_attention(
        q=q[:packed],
        k_cache=a.k_cache,
        v_cache=a.v_cache,
        k_scale=a.k_scale,
        v_scale=a.v_scale,
        prefix_k=a.prefix_k,
        prefix_v=a.prefix_v,
        kv_bits=a.kv_bits,
        start=start if packed or start < 0 else start + q.shape[0],
        scaling=a.scaling,
        sequence=sequence,
        block_table=a.block_table,
        out=out[:packed],
    )
    if packed == q.shape[0]:
        return
    end = start + q.shape[0]
    dtype = matmul_dtype(q.device) if q.dtype == torch.float32 else q.dtype

    def whole(prefix: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
        rows = _cached_rows(cache, scale, a.kv_bits, sequence, a.block_table, end, dtype)
        return torch.cat((prefix.to(dtype)[None], rows), dim=2)

    keys = whole(a.prefix_k, a.k_cache, a.k_scale)
    values = whole(a.prefix_v, a.v_cache, a.v_scale)
    _causal_attention(q.to(dtype), keys, values, a.scaling, out)


def _cached_rows(
    cache: Tensor,
    scale: Tensor | None,
    bits: int,
    sequence: int,
    block_table: Tensor | None,
    end: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows 0..end-1 of a sequence, [1, Hkv, end, D] of ``dtype``."""
    if block_table is None:
        rows = cache[sequence : sequence + 1, :, :end]
    else:
        pages = cache[block_table[sequence, : -(-end // cache.shape[2])].long()]
        rows = pages.transpose(0, 1).flatten(1, 2)[None, :, :end]
    return rows.to(dtype) if bits == 16 else kv_dequantize(rows, scale, bits, dtype)


def _causal_attention(q: Tensor, keys: Tensor, values: Tensor, scaling: float, out: Tensor):
    """q [T, Hq, D] are the last T tokens of keys [1, Hkv, S, D]; writes out [T, Hq * D]."""
    tokens, total = q.shape[0], keys.shape[2]
    for first in range(0, tokens, _QUERY_CHUNK):
        last = min(first + _QUERY_CHUNK, tokens)
        seen = total - tokens + last
        chunk = F.scaled_dot_product_attention(
            q[None, first:last].transpose(1, 2),
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=_causal_mask(last - first, seen, q.dtype),
            scale=scaling,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        out[first:last] = chunk[0].transpose(0, 1).flatten(1)


@functools.lru_cache(maxsize=1)  # all layers of a forward pass use the same one
def _causal_mask(tokens: int, keys: int, dtype: torch.dtype) -> Tensor:
    """[tokens, keys] to add to the logits, the last token attending every key."""
    hidden = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
    return torch.zeros(tokens, keys, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


_kv_prefill_attention = define(
    "kv_prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale,"
    " Tensor? v_scale, Tensor prefix_k, Tensor prefix_v, int kv_bits, int[] starts, int[] counts,"
    " float scaling, int sequence, Tensor? block_table, Tensor? output_scale, int output_bits)"
    " -> Tensor",
    fake=_kv_prefill_attention_fake,
    cpu=_kv_prefill_attention_cpu,
)


def kv_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    kv_bits: int,
    start: int | Sequence[int],
    scaling: float,
    sequence: int = 0,
    block_table: Tensor | None = None,
    *,
    counts: Sequence[int] | None = None,
    output_scale: Tensor | None = None,
    output_bits: int = 8,
) -> Tensor:
    """`kv_decode_attention` for some tokens of each sequence, which are in the cache already.

    Token t of a sequence attends the prefix and the rows 0 .. start + t of that sequence. Up to 16
    tokens are computed in float32; more in q's dtype, or in bfloat16 for a float32 q on a CPU that
    multiplies it faster.

    Args:
        q: float32, bfloat16 or float16 [T, Hq, D], the tokens of one sequence behind those of the
            other; D even, the last dimension contiguous.
        k_cache, v_cache, k_scale, v_scale, kv_bits: as for `rope_kv_append`.
        prefix_k, prefix_v, scaling: as for `kv_decode_attention`.
        start: the row of a sequence's first token, 0 or more; of all, or one for each.
        sequence: the page of the first sequence, or its row of the block table; the others follow.
        block_table: as for `kv_decode_attention`.
        counts: the tokens of each sequence, T together; None: q is of one sequence.
        output_scale, output_bits: where a scale (float32 []) is given, the result is
            ``quantize_static(result in the dtype of q, output_scale, output_bits)``.

    Returns:
        [T, Hq * D] in the dtype of q, or int8.

    Raises:
        ValueError: wrong dtype, device, shape or page, or rows beyond the cache; the message names
            the argument.
    """
    if counts is None:
        counts = [q.shape[0] if q.dim() else 0]
    return _kv_prefill_attention(
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        prefix_k,
        prefix_v,
        kv_bits,
        [start] * len(counts) if isinstance(start, int) else start,
        counts,
        scaling,
        sequence,
        block_table,
        output_scale,
        output_bits,
    )
