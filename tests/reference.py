# SPDX-License-Identifier: Apache-2.0
"""What every operation computes, in plain torch: one function an operation.

Integers are exact; float32 results follow the operation's definition rounding by rounding, so the
kernels of every instruction set must give the same bits. `tests/test_reference.py` checks these
functions against independent formulas.
"""

import math

import torch
from torch import Tensor

# ---- int4 packing ----


def pack_int4(q: Tensor) -> Tensor:
    low, high = q[..., 0::2].int() & 15, q[..., 1::2].int() & 15
    return (low | high << 4).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed.int() & 15, packed.int() >> 4), dim=-1).flatten(-2)
    return ((nibbles ^ 8) - 8).to(torch.int8)


# ---- quantizer ----


def quantize_static(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    inverse = torch.ones((), dtype=torch.float32) / scale
    q = (x.float() * inverse).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.nan_to_num(nan=0.0).to(torch.int8)


def compand(q: Tensor) -> Tensor:
    """int8, each the nearest of the sixteen levels."""
    sizes = torch.tensor([5, 14, 25, 38, 53, 72, 95, 126])
    nearest = sizes[(q.long().abs()[..., None] - sizes).abs().argmin(-1)]
    return torch.where(q < 0, -nearest, nearest).to(torch.int8)


def quantize_dynamic(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    scale = (clip * x.float().abs().amax(-1, keepdim=True)) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0.0, 1.0, scale)
    return quantize_static(x, scale, bits), scale.flatten()


# ---- RMSNorm ----


def rms_reciprocal(x: Tensor, eps: float) -> Tensor:
    """rstd of every row, float32 [..., 1]."""
    mean = x.double().square().sum(-1, keepdim=True) / x.shape[-1]
    return (1.0 / (mean + eps).sqrt()).float()


def rmsnorm_float32(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The normalized row before it is rounded to the dtype of x."""
    y = x.float() * rms_reciprocal(x, eps)
    return y if weight is None else y * weight.float()


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return rmsnorm_float32(x, weight, eps).to(x.dtype)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    bits: int,
    packed: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    y = rmsnorm_float32(x, weight, eps)
    q = quantize_static(y if shift is None else y - shift.float(), scale, bits)
    return pack_int4(q) if packed else q


def rmsnorm_quantize_dynamic(
    x: Tensor, weight: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor]:
    return quantize_dynamic(rmsnorm_float32(x, weight, eps), bits)


def add(residual: Tensor, x: Tensor) -> Tensor:
    """What add_rmsnorm_quantize leaves in the residual and normalizes."""
    return (residual.float() + x.float()).to(residual.dtype)


# ---- Hadamard ----


def integer_sign_sums(x: Tensor, signs: Tensor, block_size: int) -> Tensor:
    """The k part of a transform with 60 < k < 512, float32 [blocks, k, pow2]: sums of integers.

    All of it in float64, which holds every number here, and the sums, without rounding.
    """
    largest = x.double().abs().amax((1, 2), keepdim=True)
    finite = largest.isfinite()
    exponent = torch.frexp(torch.where(finite, largest, 0.0)).exponent.clamp_min(-90).double()
    integers = torch.where(finite, x.double() * 2.0 ** (22 - exponent), 0.0).round()
    sums = torch.einsum("ij,bjc->bic", signs.double(), integers)
    norm = torch.tensor(1.0 / math.sqrt(block_size), dtype=torch.float32)
    factor = (norm.double() * 2.0 ** (exponent - 22)).float()
    return torch.where(finite, sums.float() * factor, float("nan"))


def hadamard_float32(x: Tensor, signs: Tensor | None, block_size: int) -> Tensor:
    """The transform before it is rounded to the dtype of x."""
    k = 1 if signs is None else signs.shape[0]
    pow2 = block_size // k
    y = x.float().reshape(-1, k, pow2)
    h = 1
    while h < pow2:
        pairs = y.reshape(-1, pow2 // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2)
        h *= 2
    y = y.reshape(-1, k, pow2)
    if 60 < k < 512:
        return integer_sign_sums(y, signs, block_size).reshape(x.shape)
    if signs is not None:
        total = torch.zeros_like(y)
        for j in range(0, k, 4):
            t = [signs[:, j + b].float()[None, :, None] * y[:, None, j + b] for b in range(4)]
            total = total + ((t[0] + t[1]) + (t[2] + t[3]))
        y = total
    norm = torch.tensor(1.0 / math.sqrt(block_size), dtype=torch.float32)
    return (y * norm).reshape(x.shape)


def hadamard(x: Tensor, signs: Tensor | None, block_size: int) -> Tensor:
    return hadamard_float32(x, signs, block_size).to(x.dtype)


def hadamard_quantize(
    x: Tensor, signs: Tensor | None, block_size: int, scale: Tensor, bits: int
) -> Tensor:
    return quantize_static(hadamard_float32(x, signs, block_size), scale, bits)


def rmsnorm_hadamard_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    signs: Tensor | None,
    scale: Tensor,
    bits: int,
    shift: Tensor | None = None,
) -> Tensor:
    weighted = x.float() if weight is None else x.float() * weight.float()
    y = hadamard_float32(weighted, signs, x.shape[-1]) * rms_reciprocal(x, eps)
    return quantize_static(y if shift is None else y - shift.float(), scale, bits)


# ---- SwiGLU ----


def exp_float32(x: Tensor) -> Tensor:
    """exp of float32, operation by operation as in cpp/kernels/exp.h."""
    x = x.clamp(-104.0, 89.0)
    shifted = x * 1.44269504088896341 + 12582912.0
    n_float = shifted - 12582912.0
    n = n_float.nan_to_num(nan=0.0).int()
    r = (x - n_float * 0.693359375) - n_float * -2.12194440e-4
    poly = r * 1.9875691500e-4 + 1.3981999507e-3
    for c in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        poly = poly * r + c
    e_r = (poly * (r * r) + r) + 1.0
    half = n >> 1
    scale0 = ((half + 127) << 23).view(torch.float32)
    scale1 = ((n - half + 127) << 23).view(torch.float32)
    return (e_r * scale0) * scale1


def silu_float32(g: Tensor) -> Tensor:
    return g / (exp_float32(-g) + 1.0)


def swiglu_float32(gate: Tensor, up: Tensor) -> Tensor:
    return silu_float32(gate.float()) * up.float()


def swiglu_hadamard_quantize(
    gate: Tensor, up: Tensor, signs: Tensor | None, block_size: int, scale: Tensor, bits: int
) -> Tensor:
    return hadamard_quantize(swiglu_float32(gate, up), signs, block_size, scale, bits)


def swiglu_hadamard_quantize_dynamic(
    gate: Tensor, up: Tensor, signs: Tensor | None, block_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    return quantize_dynamic(hadamard_float32(swiglu_float32(gate, up), signs, block_size), bits)


# ---- outlier tokens ----


def outlier_scan(x: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    row_max = x.float().abs().amax(-1)
    median = row_max.median() if len(row_max) else torch.tensor(float("nan"))
    return row_max, median, row_max / median > eta


# ---- keys and values ----


def kv_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signs: Tensor | None = None,
    block_size: int = 1,
    shift: Tensor | None = None,
) -> Tensor:
    y = hadamard_float32(x, signs, block_size) if block_size > 1 else x
    if shift is not None:
        y = y.float() - shift[:, None]
    q = quantize_static(y, scale[:, None, None], bits)
    return pack_int4(q) if bits == 4 else q


def kv_dequantize(q: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    values = unpack_int4(q) if bits == 4 else q
    return (values.float() * scale[:, None, None]).to(dtype)


# ---- GEMM ----


def gemm_sums(x: Tensor, weight: Tensor) -> Tensor:
    """int32 sums of int8 [M, K] times int8 [N, K]; every partial sum fits float64's 53 bits."""
    return (x.double() @ weight.double().T).to(torch.int32)


def gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x int8 [M, K], weight int8 [N, K] (int4 weights unpacked)."""
    sums = gemm_sums(x, weight)
    if out_dtype == torch.int32:
        return sums
    y = sums.float() * (input_scale * weight_scale)
    return (y if bias is None else y + bias.float()).to(out_dtype)


def swiglu_interleaved(y: Tensor) -> Tensor:
    """Columns (gate 0, up 0, gate 1, ..); computed in float64, rounded to y's dtype once."""
    gate, up = y[:, ::2].double(), y[:, 1::2].double()
    return (gate / (1.0 + torch.exp(-gate)) * up).to(y.dtype)


# ---- low-bit GEMM ----


def gemm_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x int8 [.., K], weight int8 [N, K] (of 4-bit weights: their values)."""
    # Sums of products of bytes are far below 2^53: float64 holds them exactly.
    acc = (x.double() @ weight.double().T).to(torch.int32)
    if out_dtype == torch.int32:
        return acc
    y = acc.float() * (input_scale * weight_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


# ---- attention over the quantized cache ----


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
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[B, T, Hq, D] in `dtype`, computed in `dtype` from dequantized keys and values."""
    batch, tokens, cached = q.shape[0], q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]

    def whole(prefix: Tensor, cache: Tensor, scale: Tensor) -> Tensor:
        values = unpack_int4(cache) if cache.dtype == torch.uint8 else cache
        values = values.to(dtype) * scale.to(dtype)[:, None, None]
        prefix = prefix.to(dtype)[None].expand(batch, -1, -1, -1)
        return torch.cat((prefix, values), dim=2).repeat_interleave(group, dim=1)

    keys, values = whole(prefix_k, k, k_scale), whole(prefix_v, v, v_scale)
    if mask is None:  # the last query attends the whole cache
        mask = torch.ones(tokens, cached, dtype=torch.bool).tril(cached - tokens)[None, None]
    seen = torch.ones(*mask.shape[:3], prefix_k.shape[1], dtype=torch.bool)
    logits = q.to(dtype) @ keys.transpose(-1, -2) * scaling
    logits = logits.masked_fill(~torch.cat((seen, mask), dim=-1), -math.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)  # NaN: a row that attends nothing
    return (weights @ values).transpose(1, 2)


# ---- rope, cache of slots, attention over it ----


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] float32, cos and sin [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.float() * rms_reciprocal(x, eps) * weight.float()


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
    """q; writes to the caches."""
    kv_heads, page_size = k_cache.shape[1:3]
    dim = k_cache.shape[3] * (2 if kv_bits == 4 else 1)
    q, k, v = (
        t.view(-1, h, dim)
        for t, h in zip(
            qkv.float().split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1),
            (heads, kv_heads, kv_heads),
            strict=True,
        )
    )
    if q_norm is not None:
        q, k = head_norm(q, q_norm, eps), head_norm(k, k_norm, eps)
    q, k = (rope(x, cos[positions.long()], sin[positions.long()]) for x in (q, k))
    if rotation_size > 1:
        q, k = (hadamard_float32(x, signs, rotation_size) for x in (q, k))
    if k_shift is not None:
        k = k - k_shift
    for x, scale, cache in ((k, k_scale, k_cache), (v, v_scale, v_cache)):
        if kv_bits == 16:
            rows = x.to(cache.dtype)
        else:
            rows = kv_quantize(x[:, :, None], scale, kv_bits)[:, :, 0]
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot >= 0:
                cache[slot // page_size, :, slot % page_size] = row
    return q.to(qkv.dtype)


def cached_rows(
    cache: Tensor, scale: Tensor | None, kv_bits: int, pages: list[int], length: int
) -> Tensor:
    """The first ``length`` rows of a sequence that lies in ``pages``: [Hkv, length, D] float64."""
    rows = torch.cat([cache[0, :, :0], *(cache[page] for page in pages)], dim=1)[:, :length]
    if kv_bits == 16:
        return rows.double()
    values = unpack_int4(rows) if kv_bits == 4 else rows
    return values.double() * scale.double()[:, None, None]


def prefix_attention(
    q: Tensor, keys: Tensor, values: Tensor, prefix_k: Tensor, prefix_v: Tensor, scaling: float
) -> Tensor:
    """q [T, Hq, D], the last T tokens of keys [Hkv, S, D], in the dtype of keys -> [T, Hq * D]."""
    dtype, tokens, total = keys.dtype, q.shape[0], keys.shape[1]
    group = q.shape[1] // keys.shape[0]
    keys, values = (
        torch.cat((prefix.to(dtype), rows), dim=1).repeat_interleave(group, dim=0)
        for prefix, rows in ((prefix_k, keys), (prefix_v, values))
    )
    if keys.shape[1] == 0:
        return torch.zeros(tokens, q.shape[1] * q.shape[2], dtype=dtype)
    logits = q.to(dtype).transpose(0, 1) @ keys.transpose(-1, -2) * scaling
    mask = torch.ones(tokens, keys.shape[1], dtype=torch.bool).tril(
        prefix_k.shape[1] + total - tokens
    )
    weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ values).transpose(0, 1).flatten(1)
