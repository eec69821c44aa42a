# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of attention over a cache, one by one)
"""Causal attention of the new tokens of one sequence over the prefix and the cached rows."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define
from prefixquant.ops.kv_decode_attention import empty_output
from prefixquant.ops.kv_quant import kv_dequantize
from prefixquant.quantizer import matmul_dtype

# Up to this many query tokens the cache is read as it is; beyond, unpacking it once and using
# matrix products is faster. Those run in bfloat16 where the CPU has it: at 512 tokens and 9 heads
# of 64, 2.0 ms against 5.5 in float32 (one core with AMX).
_PACKED_QUERY_TOKENS = 16
# Queries that attend together: later keys than those of the last one are not touched.
_QUERY_CHUNK = 512


def _kv_prefill_attention_fake(
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
    sequence: int,
    block_table: Tensor | None,
) -> Tensor:
    return empty_output(q)


def _kv_prefill_attention_cpu(
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
    sequence: int,
    block_table: Tensor | None,
) -> Tensor:
    out = empty_output(q)
    # With more tokens the kernel gets none of them: then it only checks the arguments.
    packed = q.shape[0] if q.shape[0] <= _PACKED_QUERY_TOKENS else 0
    _C.kv_prefill_attention(
        q=q[:packed],
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        v_scale=v_scale,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        kv_bits=kv_bits,
        start=start if packed or start < 0 else start + q.shape[0],
        scaling=scaling,
        sequence=sequence,
        block_table=block_table,
        out=out[:packed],
    )
    if packed == q.shape[0]:
        return out
    end = start + q.shape[0]
    dtype = matmul_dtype(q.device) if q.dtype == torch.float32 else q.dtype

    def whole(prefix: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
        rows = _cached_rows(cache, scale, kv_bits, sequence, block_table, end, dtype)
        return torch.cat((prefix.to(dtype)[None], rows), dim=2)

    keys, values = whole(prefix_k, k_cache, k_scale), whole(prefix_v, v_cache, v_scale)
    return _causal_attention(q.to(dtype), keys, values, scaling, out)


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
    return out


@functools.lru_cache(maxsize=1)  # all layers of a forward pass use the same one
def _causal_mask(tokens: int, keys: int, dtype: torch.dtype) -> Tensor:
    """[tokens, keys] to add to the logits, the last token attending every key."""
    hidden = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
    return torch.zeros(tokens, keys, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


_kv_prefill_attention = define(
    "kv_prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale,"
    " Tensor? v_scale, Tensor prefix_k, Tensor prefix_v, int kv_bits, int start, float scaling,"
    " int sequence, Tensor? block_table) -> Tensor",
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
) -> Tensor:
    """`kv_decode_attention` for T tokens of one sequence, which are in the cache already.

    Token t attends the prefix and the cached rows 0 .. start + t. Few tokens (16 on the CPU) are
    computed in float32; more in q's dtype, or in bfloat16 for a float32 q on a CPU that multiplies
    it faster.

    Args:
        q: float32, bfloat16 or float16 [T, Hq, D], D even, the last dimension contiguous.
        k_cache, v_cache, k_scale, v_scale, kv_bits: as for `rope_kv_append`.
        prefix_k, prefix_v, scaling: as for `kv_decode_attention`.
        start: the row of the first token, 0 or more.
        sequence: its page, or its row of the block table.
        block_table: as for `kv_decode_attention`.

    Returns:
        [T, Hq * D] in the dtype of q.

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
    )
