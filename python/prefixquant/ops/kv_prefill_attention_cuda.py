# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementation of kv_prefill_attention.

A few tokens of a sequence read the packed cache (`kv_attention_cuda`). More of them unpack it once,
for all sequences of the call, and use torch's attention: cuDNN's for much work that begins at row 0
on a Hopper GPU or later, else FlashAttention 2.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from prefixquant.ops._library import implement
from prefixquant.ops._rows import launch
from prefixquant.ops.kv_attention_cuda import (
    PACKED_QUERY_TOKENS,
    check_types,
    kernel_takes,
    launch_attention,
)
from prefixquant.ops.kv_decode_attention import empty_output
from prefixquant.ops.kv_prefill_attention import KvPrefillAttentionArguments, check_sequences
from prefixquant.ops.kv_quant_cuda import dequantized_rows

_CUDNN_DIM = 128  # largest head dimension
# cuDNN makes a plan for every new shape, which takes 50 ms. So lengths are rounded up, to a 32nd of
# the power of two above them, and calls of less work (sequences * tokens^2) go without: at this
# much it saves 80 us of a layer with 32 heads of 128 (H100).
_CUDNN_PARTS, _CUDNN_LEAST_ROWS = 32, 64
_CUDNN_LEAST_WORK = 1 << 22


@functools.cache
def _cudnn_is_there(device: int) -> bool:
    # Before Hopper it is not ahead of FlashAttention 2.
    return (
        hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(device)[0] >= 9
    )


def _takes_cudnn(a: KvPrefillAttentionArguments, tokens: int) -> bool:
    # Its causal mask is aligned to the upper left: query i sees keys 0 to i.
    return (
        a.start == 0
        and a.sequences * tokens**2 >= _CUDNN_LEAST_WORK
        and a.q.dtype != torch.float32
        and a.q.shape[-1] % 8 == 0
        and a.q.shape[-1] <= _CUDNN_DIM
        and torch.backends.cuda.cudnn_sdp_enabled()
        and _cudnn_is_there(a.q.device.index)
    )


def _cudnn_rows(rows: int) -> int:
    step = max(_CUDNN_LEAST_ROWS, (1 << (rows - 1).bit_length()) // _CUDNN_PARTS)
    return -(-rows // step) * step


def _keys_and_values(
    a: KvPrefillAttentionArguments, rows: int, unused: int = 0
) -> tuple[Tensor, Tensor]:
    """[prefix | first ``rows`` rows | zeros] of every sequence, [B, Hkv, P + rows + unused, D]."""
    q, prefix = a.q, a.prefix_k.shape[1]
    first, last = a.sequence, a.sequence + a.sequences
    table = None if a.block_table is None else a.block_table[first:last]
    heads, dim = a.prefix_k.shape[0], a.prefix_k.shape[2]
    whole = q.new_empty((2, a.sequences, heads, prefix + rows + unused, dim))
    if unused:
        whole[..., prefix + rows :, :].zero_()
    for part, own_prefix, cache, scale in zip(
        whole,
        (a.prefix_k, a.prefix_v),
        (a.k_cache, a.v_cache),
        (a.k_scale, a.v_scale),
        strict=True,
    ):
        if prefix:
            part[:, :, :prefix] = own_prefix
        pages = cache if table is not None else cache[first:last]
        dequantized_rows(pages, scale, part[:, :, prefix : prefix + rows], table)
    return whole[0], whole[1]


def _attend_cudnn(a: KvPrefillAttentionArguments, tokens: int) -> Tensor:
    """[B, T, Hq, D]; rows that stand for the prefix are in front of the queries, and dropped."""
    prefix, heads, dim = a.prefix_k.shape[1], *a.q.shape[1:]
    total = _cudnn_rows(prefix + tokens)
    last = prefix + tokens
    keys, values = _keys_and_values(a, tokens, total - last)
    queries = a.q.view(a.sequences, tokens, heads, dim)
    if total != tokens:
        padded = queries.new_empty((a.sequences, total, heads, dim))
        padded[:, :prefix].zero_()
        padded[:, prefix:last] = queries
        padded[:, last:].zero_()
        queries = padded
    attended = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries.transpose(1, 2),
        keys,
        values,
        None,  # attn_bias
        False,  # compute_log_sumexp
        0.0,  # dropout_p
        True,  # is_causal
        False,  # return_debug_mask
        scale=a.scaling,
    )[0]
    return attended.transpose(1, 2)[:, prefix:last]


def _attend_lower_right(a: KvPrefillAttentionArguments, tokens: int) -> Tensor:
    """[B, T, Hq, D]"""
    heads, dim = a.q.shape[1:]
    keys, values = _keys_and_values(a, a.start + tokens)
    queries = a.q.view(a.sequences, tokens, heads, dim).transpose(1, 2)
    if a.q.dtype != torch.float32 and dim % 8 == 0:
        # Aligned to the lower right as FlashAttention 2 is; grouped heads need no copies there.
        attended = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, True, False, scale=a.scaling
        )[0]
    else:
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=causal_lower_right(tokens, keys.shape[2]),
            scale=a.scaling,
            enable_gqa=heads != keys.shape[1],
        )
    return attended.transpose(1, 2)


def _attend_packed(a: KvPrefillAttentionArguments, tokens: int, out: Tensor) -> Tensor:
    """All of ``a`` by the kernel that reads the packed cache."""
    first, last = a.sequence, a.sequence + a.sequences
    caches, table = (a.k_cache, a.v_cache), None
    if a.block_table is None:
        caches = (a.k_cache[first:last], a.v_cache[first:last])
    else:
        table = a.block_table[first:last]
    launch_attention(
        "kv_prefill_attention",
        a.q.view(a.sequences, tokens, *a.q.shape[1:]),
        caches,
        (a.k_scale, a.v_scale),
        (a.prefix_k, a.prefix_v),
        max_length=a.start + tokens,
        block_table=table,
        scaling=a.scaling,
        output_scale=a.output_scale,
        output_bits=a.output_bits,
        out=out,
    )
    return out


def _finish(a: KvPrefillAttentionArguments, attended: Tensor, out: Tensor) -> Tensor:
    """attended [B, T, Hq, D] as out [B * T, Hq * D], quantized where there is a scale."""
    batch, tokens = attended.shape[:2]
    if a.output_scale is None and attended.is_contiguous():
        return attended.reshape(out.shape)
    if a.output_scale is None:
        out.view(attended.shape).copy_(attended)
        return out
    # The rows of one sequence lie at one distance, those of all of them do not.
    whole = attended.is_contiguous()
    for x, q in (
        [(attended, out)] if whole else zip(attended, out.view(batch, tokens, -1), strict=True)
    ):
        rows = x.reshape(q.shape)
        launch("quantize_static", rows, x=rows, scale=a.output_scale, bits=a.output_bits, q=q)
    return out


def _kv_prefill_attention(*arguments) -> Tensor:
    a = KvPrefillAttentionArguments(*arguments)
    out = empty_output(a.q, a.output_scale)
    check_types("kv_prefill_attention", a.q, a.k_cache, a.kv_bits)
    check_sequences(a.q, a.sequences)
    tokens = a.q.shape[0] // a.sequences
    pages = 1 if a.block_table is None else a.block_table.shape[1]
    capacity = a.k_cache.shape[2] * pages
    if a.start < 0 or a.start + tokens > capacity:
        raise ValueError(
            f"kv_prefill_attention: start: expected the tokens to lie in rows 0 to {capacity - 1}, "
            f"got {a.start}"
        )
    if tokens == 0:
        return out
    if tokens <= PACKED_QUERY_TOKENS and kernel_takes(a.q, a.k_cache):
        return _attend_packed(a, tokens, out)
    attend = _attend_cudnn if _takes_cudnn(a, tokens) else _attend_lower_right
    return _finish(a, attend(a, tokens), out)


implement("kv_prefill_attention", _kv_prefill_attention)
