# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of the operation, one by one)
"""Between projection and attention: q/k norms, RoPE, R3, and keys and values into the cache."""

from typing import NamedTuple

from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import launch


def empty_queries(qkv: Tensor, k_cache: Tensor, kv_bits: int, heads: int) -> Tensor:
    """An uninitialised [T, heads, D] of the dtype of qkv."""
    dim = k_cache.shape[-1] * (2 if kv_bits == 4 else 1) if k_cache.dim() else 0
    return qkv.new_empty((qkv.shape[0] if qkv.dim() else 0, max(heads, 0), dim))


class RopeKvAppendArguments(NamedTuple):
    """The arguments of the operation, in the order of its schema and by the names of ``_C``."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    signs: Tensor | None
    rotation_size: int
    k_shift: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    kv_bits: int
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    heads: int


def _rope_kv_append_fake(*arguments) -> Tensor:
    a = RopeKvAppendArguments(*arguments)
    return empty_queries(a.qkv, a.k_cache, a.kv_bits, a.heads)


def _run_rope_kv_append(*arguments) -> Tensor:
    a = RopeKvAppendArguments(*arguments)
    q = _rope_kv_append_fake(*arguments)
    launch("rope_kv_append", a.qkv, **a._asdict(), q=q)
    return q


_rope_kv_append = define_on_every_device(
    "rope_kv_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor? q_norm,"
    " Tensor? k_norm, float eps, Tensor? signs, int rotation_size, Tensor? k_shift,"
    " Tensor? k_scale, Tensor? v_scale, int kv_bits, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor slots, int heads) -> Tensor",
    fake=_rope_kv_append_fake,
    run=_run_rope_kv_append,
)


def rope_kv_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    signs: Tensor | None,
    rotation_size: int,
    k_shift: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    kv_bits: int,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    heads: int,
) -> Tensor:
    """``q = R3 rope(norm(q))`` returned; ``R3 rope(norm(k)) - k_shift`` and ``v`` written to the
    cache.

    ::

        norm(x) = (x * rstd) * weight,  rstd = float32(1 / sqrt(mean(x^2) + eps)), mean in float64
        rope(x) = x * cos[position] + (-x[D/2:], x[:D/2]) * sin[position]
        R3 x    = hadamard(x), block_size = rotation_size
        cached  = clamp(rint(x * (1 / scale[h])))

    All in float32, each operation rounded on its own; q is rounded once, to the dtype of qkv, and k
    and v are quantized from float32 (rounded to the cache's dtype at 16 bits).

    Args:
        qkv: float32, bfloat16 or float16 [T, (Hq + 2 Hkv) * D], heads of q, then k, then v; rows at
            any distance. D is even.
        cos, sin: float32 [positions, D], contiguous; they carry the RoPE type and its factors.
        positions: int32 [T], rows of cos and sin.
        q_norm, k_norm: floating [D] RMSNorm weights, or both None.
        eps: of the norms, 0 or more.
        signs, rotation_size: the Hadamard over D as for `hadamard`, rotation_size = D; 1: none.
        k_shift: float32 [Hkv, D], taken from every key of a head, which changes no softmax over
            keys that it was taken from (`prefixquant.centre`); None: nothing is.
        k_scale, v_scale: float32 [Hkv]; None at 16 bits.
        kv_bits: 4, 8 or 16.
        k_cache, v_cache: [pages, Hkv, page_size, D/2] uint8 at 4 bits (low nibble = even index),
            [.., D] int8 at 8 bits, [.., D] floating at 16; the last dimension contiguous.
        slots: int64 [T]: token t goes to row ``slots[t] % page_size`` of page
            ``slots[t] // page_size``; below 0 it is not written. No slot may come twice.
        heads: Hq, a multiple of Hkv.

    Returns:
        [T, Hq, D] of the dtype of qkv, contiguous, not scaled.

    Raises:
        ValueError: wrong dtype, device, shape, position or slot; the message names the argument.
            (Positions and slots are read only on the CPU; elsewhere they must be right.)
    """
    return _rope_kv_append(
        qkv,
        cos,
        sin,
        positions,
        q_norm,
        k_norm,
        eps,
        signs,
        rotation_size,
        k_shift,
        k_scale,
        v_scale,
        kv_bits,
        k_cache,
        v_cache,
        slots,
        heads,
    )
