# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of attention over a cache, one by one)
"""Causal attention of the new tokens of sequences over the prefix and the cached rows."""

import functools
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
    """The arguments of the operation, in the order of its schema and by the names of ``_C``."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    prefix_k: Tensor
    prefix_v: Tensor
    kv_bits: int
    start: int
    scaling: float
    sequence: int
    block_table: Tensor | None
    sequences: int = 1
    output_scale: Tensor | None = None
    output_bits: int = 8


def check_sequences(q: Tensor, sequences: int) -> None:
    """The queries must divide into so many sequences."""
    if sequences < 1 or q.shape[0] % sequences:
        raise ValueError(
            "kv_prefill_attention: sequences: expected at least 1 and a divisor of the "
            f"{q.shape[0]} rows of q, got {sequences}"
        )


def _kv_prefill_attention_fake(*arguments) -> Tensor:
    a = KvPrefillAttentionArguments(*arguments)
    return empty_output(a.q, a.output_scale)


def _kv_prefill_attention_cpu(*arguments) -> Tensor:
    a = KvPrefillAttentionArguments(*arguments)
    out = empty_output(a.q)
    check_sequences(a.q, a.sequences)
    tokens = a.q.shape[0] // a.sequences
    for index in range(a.sequences):
        rows = slice(index * tokens, (index + 1) * tokens)
        one = a._replace(q=a.q[rows], sequence=a.sequence + index)
        _attend_sequence(one, out[rows])
    return out if a.output_scale is None else quantize_static(out, a.output_scale, a.output_bits)


def _attend_sequence(a: KvPrefillAttentionArguments, out: Tensor) -> None:
    """Writes out [T, Hq * D] of one sequence."""
    q, start = a.q, a.start
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
        sequence=a.sequence,
        block_table=a.block_table,
        out=out[:packed],
    )
    if packed == q.shape[0]:
        return
    end = start + q.shape[0]
    dtype = matmul_dtype(q.device) if q.dtype == torch.float32 else q.dtype

    def whole(prefix: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
        rows = _cached_rows(cache, scale, a.kv_bits, a.sequence, a.block_table, end, dtype)
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
    " Tensor? v_scale, Tensor prefix_k, Tensor prefix_v, int kv_bits, int start, float scaling,"
    " int sequence, Tensor? block_table, int sequences=1, Tensor? output_scale=None,"
    " int output_bits=8) -> Tensor",
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
    start: int,
    scaling: float,
    sequence: int = 0,
    block_table: Tensor | None = None,
    *,
    sequences: int = 1,
    output_scale: Tensor | None = None,
    output_bits: int = 8,
) -> Tensor:
    """`kv_decode_attention` for T tokens each of some sequences, which are in the cache already.

    Token t attends the prefix and the cached rows 0 .. start + t of its sequence. Few tokens (16)
    are computed in float32; more in q's dtype, or in bfloat16 for a float32 q on a CPU that
    multiplies it faster.

    Args:
        q: float32, bfloat16 or float16 [sequences * T, Hq, D], one sequence behind the other; D
            even, the last dimension contiguous.
        k_cache, v_cache, k_scale, v_scale, kv_bits: as for `rope_kv_append`.
        prefix_k, prefix_v, scaling: as for `kv_decode_attention`.
        start: the row of the first token of each sequence, 0 or more.
        sequence: the page of the first sequence, or its row of the block table; the others follow.
        block_table: as for `kv_decode_attention`.
        sequences: at least 1.
        output_scale, output_bits: where a scale (float32 []) is given, the result is
            ``quantize_static(result in the dtype of q, output_scale, output_bits)``.

    Returns:
        [sequences * T, Hq * D] in the dtype of q, or int8.

    Raises:
        ValueError: wrong dtype, device, shape or page, or rows beyond the cache; the message names
            the argument.
    """
    return _kv_prefill_attention(
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        prefix_k,
        prefix_v,
        kv_bits,
        start,
        scaling,
        sequence,
        block_table,
        sequences,
        output_scale,
        output_bits,
    )
