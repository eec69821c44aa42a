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
# it once and using matrix products is faster. Those run in bfloat16 where the CPU has it: at 512
# tokens and 9 heads of 64, 2.0 ms against 5.5 in float32 (one core with AMX).
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
        return _float_attention(kv, query, kv.rotation(key), value, attention_mask, scaling), None
    packed = key if isinstance(key, PackedKV) else kv.quantize(key, value)
    if query.shape[2] <= _PACKED_QUERY_TOKENS:
        out = ops.kv_attention(
            query,
            packed.key,
            packed.value,
            kv.k_scale,
            kv.v_scale,
            kv.prefix_key,
            kv.prefix_value,
            attention_mask,
            scaling,
        )
        return out, None
    dtype = matmul_dtype(query.device) if query.dtype == torch.float32 else query.dtype
    key, value = kv.dequantize(packed, dtype)
    return _float_attention(kv, query.to(dtype), key, value, attention_mask, scaling), None


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
