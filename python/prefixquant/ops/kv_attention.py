# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of attention over a quantized cache, one by one)
"""Attention of queries over a 16-bit prefix and a quantized KV cache."""

from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define


def _kv_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    if q.dim() != 4:  # the checks in C++ name the argument; here there is only no shape to give
        raise ValueError(f"kv_attention: q: expected 4 dimensions, got shape {list(q.shape)}")
    batch, heads, tokens, dim = q.shape
    return q.new_empty((batch, tokens, heads, dim))


def _kv_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    out = _kv_attention_fake(q, k, v, k_scale, v_scale, prefix_k, prefix_v, mask, scaling)
    _C.kv_attention(
        q=q if q.stride(-1) == 1 else q.contiguous(),
        k=k,
        v=v,
        k_scale=k_scale,
        v_scale=v_scale,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        mask=mask,
        scaling=scaling,
        out=out,
    )
    return out


_kv_attention = define(
    "kv_attention(Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, Tensor prefix_k,"
    " Tensor prefix_v, Tensor? mask, float scaling) -> Tensor",
    fake=_kv_attention_fake,
    cpu=_kv_attention_cpu,
)


def kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """``softmax(scaling * q [prefix_k | k_scale k]^T + mask) [prefix_v | v_scale v]``, in float32.

    The cache is read in its packed form; query head h uses KV head ``h * Hkv // Hq``. Prefix keys
    are always attended. A row that may attend nothing (no prefix, mask all False) is zero.

    Args:
        q: float32, bfloat16 or float16 [B, Hq, T, D], D even.
        k: uint8 [B, Hkv, S, D/2], packed int4 (low nibble = even index), or int8 [B, Hkv, S, D].
            May be a view of a larger buffer; only the last dimension must be contiguous.
        v: as k.
        k_scale: float32 [Hkv].
        v_scale: float32 [Hkv].
        prefix_k: float32, bfloat16 or float16 [Hkv, P, D]; P may be 0.
        prefix_v: as prefix_k.
        mask: bool [B or 1, 1, T, S], True = attend. None: causal, aligned to the lower right (the
            last query attends the whole cache).
        scaling: factor of the logits, usually 1/sqrt(D).

    Returns:
        [B, T, Hq, D] in the dtype of q.

    Raises:
        ValueError: wrong dtype, device or shape; the message names the argument.
    """
    return _kv_attention(q, k, v, k_scale, v_scale, prefix_k, prefix_v, mask, scaling)
