# SPDX-License-Identifier: Apache-2.0
"""The attention function and the mask function that transformers models call under our name.

The prefix is hidden here: its K/V are put in front of the keys inside the attention, at positions
-P..-1, so prompts keep positions 0.., no cache is seeded, and padding, beams and chunked prefill
work as in any model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from prefixquant import ops
from prefixquant.modeling.cache import KVQuantizer, PackedKV
from prefixquant.quantizer import matmul_dtype

NAME = "prefixquant"

# Up to this many query tokens the packed cache is read as it is (kv_attention); beyond, unpacking
# it once and using matrix products is faster. On a CPU those run in bfloat16 where it has that: at
# 512 tokens and 9 heads of 64, 2.0 ms against 5.5 in float32 (one core with AMX).
_PACKED_QUERY_TOKENS = 16


def attention_mask(*args, **kwargs) -> Tensor | None:
    """`sdpa_mask` that is always spelled out: bool [B, 1, T, S] over the tokens, True = attend. The
    prefix, which every query may see, is added by `attention`."""
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def attention(
    module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """softmax over [prefix | tokens], K and V as the cache holds them.

    Args:
        module: a transformers attention with a `KVQuantizer` as ``module.kv_quantizer``.
        query: [B, H, T, D] after RoPE.
        key, value: `PackedKV` from a `QuantizedLayer`, or float [B, H_kv, S, D].
        attention_mask: bool [B, 1, T, S] or None for causal, aligned to the lower right.

    Returns:
        ([B, T, H, D] in the dtype of query or bfloat16, None)
    """
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: the quantized attention does not return its weights")
    kv: KVQuantizer = module.kv_quantizer
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = kv.rotation(query)
    if kv.bits == 16:
        cache = PackedKV(kv.rotation(key), value)
    else:
        cache = key if isinstance(key, PackedKV) else kv.quantize(key, value)
    few = query.shape[2] <= _PACKED_QUERY_TOKENS
    if query.is_cuda and not few:
        rows = causal_rows(attention_mask, *query.shape[:3:2], cache.key.shape[2])
        if rows is not None:
            return attention_by_sequence(kv, query, cache, rows, scaling), None
    if kv.bits == 16:
        return _float_attention(kv, query, cache.key, cache.value, attention_mask, scaling), None
    if few or query.is_cuda:
        out = ops.kv_attention(
            query,
            cache.key,
            cache.value,
            kv.k_scale,
            kv.v_scale,
            kv.prefix_key,
            kv.prefix_value,
            attention_mask,
            scaling,
        )
        return out, None
    dtype = matmul_dtype(query.device) if query.dtype == torch.float32 else query.dtype
    key, value = kv.dequantize(cache, dtype)
    return _float_attention(kv, query.to(dtype), key, value, attention_mask, scaling), None


def causal_rows(
    mask: Tensor | None, batch: int, tokens: int, cached: int
) -> list[tuple[int, int]] | None:
    """(first, end) per sequence: its queries are the rows before ``end`` of the keys, and each
    attends ``first`` up to its own row. That is a mask of left padding, of a static cache, or of
    neither; None for any other, and where the mask cannot be looked at.

    Reads two numbers a sequence back from the device, once a forward pass.
    """
    if mask is None:
        return [(0, cached)] * batch
    if torch.compiler.is_compiling():
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if not hasattr(mask, "_prefixquant_rows"):
        column = torch.arange(cached, device=mask.device)
        last = mask[:, 0, -1]
        first = torch.where(last, column, cached).amin(-1)
        end = torch.where(last, column + 1, 0).amax(-1)
        query = torch.arange(tokens, device=mask.device)[:, None]
        own = (end[:, None, None] - tokens + query)[:, None]
        expected = (column >= first[:, None, None, None]) & (column <= own)
        is_causal = (expected == mask).flatten(1).all(-1) & (end >= tokens)
        rows = torch.stack((first, end, is_causal.long()), -1).tolist()
        known = [(f, e) for f, e, causal in rows if causal]
        mask._prefixquant_rows = known if len(known) == len(rows) else None
    rows = mask._prefixquant_rows
    return rows * batch if rows is not None and len(rows) == 1 else rows


def attention_by_sequence(
    kv: KVQuantizer, query: Tensor, cache: PackedKV, rows: list[tuple[int, int]], scaling: float
) -> Tensor:
    """[B, T, H, D] by the operation that a prompt without padding takes, so that padding changes no
    bit of a result; queries that are padding get zeros."""
    batch, heads, tokens, dim = query.shape
    out = query.new_zeros(batch, tokens, heads, dim)
    for b, (first, end) in enumerate(rows):
        padding = max(0, tokens - (end - first))
        out[b, padding:] = ops.kv_prefill_attention(
            query[b, :, padding:].transpose(0, 1),
            cache.key[b : b + 1, :, first:end],
            cache.value[b : b + 1, :, first:end],
            kv.k_scale,
            kv.v_scale,
            kv.prefix_key,
            kv.prefix_value,
            kv.bits,
            max(0, end - first - tokens),
            scaling,
        ).view(tokens - padding, heads, dim)
    return out


def _float_attention(
    kv: KVQuantizer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    batch, heads, length, _ = query.shape
    tokens = key.shape[2]
    if mask is None:
        mask = torch.ones(length, tokens, dtype=torch.bool, device=query.device)
        mask = mask.tril(tokens - length)[None, None]
    if kv.prefix_length:
        key, value = (
            torch.cat((p.to(t.dtype).expand(batch, -1, -1, -1), t), dim=2)
            for p, t in ((kv.prefix_key, key), (kv.prefix_value, value))
        )
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_additive_mask(mask, kv.prefix_length, query.dtype),
        scale=scaling,
        enable_gqa=heads != key.shape[1],
    )
    return out.transpose(1, 2)


def _additive_mask(mask: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """bool [B, 1, T, S] -> [B, 1, T, P + S] to add, the prefix in front and seen by every query.

    What is hidden gets the lowest finite value: a row of padding that may see nothing stays finite.
    All layers of a forward pass get the same mask object: what is made of it for the first is kept
    on it for the others.
    """
    kept = getattr(mask, "_prefixquant_additive", None)
    if kept is None or kept.shape[-1] != prefix + mask.shape[-1] or kept.dtype != dtype:
        kept = torch.zeros(
            *mask.shape[:-1], prefix + mask.shape[-1], dtype=dtype, device=mask.device
        )
        kept[..., prefix:].masked_fill_(~mask, torch.finfo(dtype).min)
        mask._prefixquant_additive = kept
    return kept


def register() -> None:
    """Makes ``attn_implementation="prefixquant"`` known to transformers; safe to call again."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
