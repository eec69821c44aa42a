# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of attention over a cache, one by one)
"""Attention of one query token a sequence over the prefix and the cached rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define


def empty_output(q: Tensor, output_scale: Tensor | None = None) -> Tensor:
    """An uninitialised [T, Hq * D], int8 where there is an output scale."""
    if q.dim() != 3:  # the checks in C++ name the argument; here there is only no shape to give
        raise ValueError(f"q: expected 3 dimensions, got shape {list(q.shape)}")
    dtype = q.dtype if output_scale is None else torch.int8
    return q.new_empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=dtype)


class KvDecodeAttentionArguments(NamedTuple):
    """The arguments of the operation, in the order of its schema and by the names of ``_C``."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    prefix_k: Tensor
    prefix_v: Tensor
    lengths: Tensor
    block_table: Tensor | None
    kv_bits: int
    max_length: int
    scaling: float
    output_scale: Tensor | None
    output_bits: int


def _kv_decode_attention_fake(*arguments) -> Tensor:
    a = KvDecodeAttentionArguments(*arguments)
    return empty_output(a.q, a.output_scale)


def _kv_decode_attention_cpu(*arguments) -> Tensor:
    out = _kv_decode_attention_fake(*arguments)
    _C.kv_decode_attention(**KvDecodeAttentionArguments(*arguments)._asdict(), out=out)
    return out


_kv_decode_attention = define(
    "kv_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale,"
    " Tensor? v_scale, Tensor prefix_k, Tensor prefix_v, Tensor lengths, Tensor? block_table,"
    " int kv_bits, int max_length, float scaling, Tensor? output_scale, int output_bits) -> Tensor",
    fake=_kv_decode_attention_fake,
    cpu=_kv_decode_attention_cpu,
)


def kv_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    kv_bits: int,
    max_length: int,
    scaling: float,
    output_scale: Tensor | None = None,
    output_bits: int = 8,
) -> Tensor:
    """``softmax(scaling * q [prefix_k | k_scale k]^T) [prefix_v | v_scale v]``, in float32.

    Sequence b attends the prefix and its first ``lengths[b]`` cached rows; query head h uses KV
    head ``h * Hkv // Hq``. Where it attends nothing (no prefix, length 0) the result is zero.

    Args:
        q: float32, bfloat16 or float16 [B, Hq, D], D even, the last dimension contiguous.
        k_cache, v_cache, kv_bits: as for `rope_kv_append`.
        k_scale, v_scale: float32 [Hkv]; None at 16 bits.
        prefix_k, prefix_v: floating [Hkv, P, D], contiguous; P may be 0.
        lengths: int32 [B], 0 to max_length.
        block_table: None: sequence b lies in page b. Else int32 [>= B, pages of a sequence]: its
            rows lie in the pages ``block_table[b]``, in order; unused entries may be anything.
        max_length: a bound of lengths that the host knows.
        scaling: factor of the logits, usually 1/sqrt(D).
        output_scale, output_bits: where a scale (float32 []) is given, the result is
            ``quantize_static(result in the dtype of q, output_scale, output_bits)``.

    Returns:
        [B, Hq * D] in the dtype of q, or int8.

    Raises:
        ValueError: wrong dtype, device, shape, length or page; the message names the argument.
            (Lengths and pages are read only on the CPU; elsewhere they must be right.)
    """
    return _kv_decode_attention(
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        prefix_k,
        prefix_v,
        lengths,
        block_table,
        kv_bits,
        max_length,
        scaling,
        output_scale,
        output_bits,
    )
