# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  (the arguments of attention over a cache, one by one)
"""The CUDA implementations of kv_attention and kv_decode_attention.

Few query tokens in 16 bits and a head dimension of 64, 96, 128 or 256 read the packed cache
(``cuda/include/prefixquant/kv_attention.cuh``). Many query tokens unpack it once and use torch's
attention, whose matrix products then dominate; so does whatever else the kernel does not cover.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import implement, on_device, stream_of
from prefixquant.ops.kv_decode_attention import empty_output
from prefixquant.ops.kv_quant_cuda import dequantized_rows

# Up to this many query tokens the packed cache is read once for every 8 columns (a column is one
# query token of one head); beyond, unpacking it once is less work.
PACKED_QUERY_TOKENS = 16
_KERNEL_DIMS = (64, 96, 128, 256)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# (device, stream) -> (graph capture or 0, counters that every launch leaves at zero, partial sums)
_workspaces: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}
_LEAST_COUNTER_BYTES = 1 << 16  # one buffer for all batch sizes up to that of 16384 rows


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(sizes: tuple[int, ...], device: int) -> tuple[int, int]:
    batch, tokens, heads, kv_heads, dim = sizes
    return _C.kv_attention_workspace_cuda(
        batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, dim=dim, device=device
    )


def _workspace(sizes: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Scratch of a launch: one a stream, and one a graph in that graph's memory pool."""
    counter_bytes, partial_bytes = _workspace_bytes(sizes, device.index)
    capture = 0
    if torch.cuda.is_current_stream_capturing():
        capture = _C.capture_id_cuda(stream=stream)
    kept = _workspaces.get((device.index, stream))
    if (
        kept is None
        or kept[0] != capture
        or kept[1].numel() < counter_bytes
        or kept[2].numel() < partial_bytes
    ):
        counter_bytes = max(counter_bytes, _LEAST_COUNTER_BYTES)
        counters = torch.zeros(counter_bytes, dtype=torch.uint8, device=device)
        partials = torch.empty(partial_bytes, dtype=torch.uint8, device=device)
        kept = _workspaces[device.index, stream] = (capture, counters, partials)
    return kept[1], kept[2]


def kernel_takes(q: Tensor, cache: Tensor) -> bool:
    """q [.., D] and a cache [.., D or D/2], both as the kernel reads them."""
    quantized = cache.dtype in (torch.uint8, torch.int8)
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] in _KERNEL_DIMS
        and (quantized or cache.dtype == q.dtype)
    )


def check_types(op: str, q: Tensor, k_cache: Tensor, kv_bits: int) -> None:
    """What the C++ checks of the kernel would not see, or see under another operation's name."""
    if q.dtype not in _FLOATS:
        raise ValueError(f"{op}: q: expected dtype float32, bfloat16 or float16, got {q.dtype}")
    dtypes = {4: (torch.uint8,), 8: (torch.int8,), 16: _FLOATS}
    if kv_bits not in dtypes:
        raise ValueError(f"{op}: kv_bits: expected 4, 8 or 16, got {kv_bits}")
    if k_cache.dtype not in dtypes[kv_bits]:
        expected = " or ".join(str(t).removeprefix("torch.") for t in dtypes[kv_bits])
        raise ValueError(
            f"{op}: k_cache: expected dtype {expected} at {kv_bits} bits, got {k_cache.dtype}"
        )


def _aligned_heads(q: Tensor) -> Tensor:
    """q with contiguous heads that begin at multiples of 16 bytes."""
    strided = any(n > 1 and s % 8 for n, s in zip(q.shape[:-1], q.stride()[:-1], strict=True))
    if q.stride(-1) != 1 or strided or q.data_ptr() % 16:
        return q.clone(memory_format=torch.contiguous_format)
    return q


def launch_attention(
    op: str,
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    prefix: tuple[Tensor, Tensor],
    *,
    max_length: int,
    scaling: float,
    out: Tensor,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    output_scale: Tensor | None = None,
    output_bits: int = 8,
) -> None:
    """q [B, T, Hq, D] -> out, [B, T, Hq, D] in memory."""
    if prefix[0].dtype not in (torch.float16, torch.bfloat16):
        prefix = (prefix[0].to(q.dtype), prefix[1].to(q.dtype))
    batch, tokens, heads, dim = q.shape
    kv_heads = caches[0].shape[1] if caches[0].dim() == 4 else 1
    with on_device(q):
        stream = stream_of(q)
        counters, partials = _workspace((batch, tokens, heads, kv_heads, dim), q.device, stream)
        _C.kv_attention_cuda(
            op=op,
            q=_aligned_heads(q),
            k=caches[0],
            v=caches[1],
            k_scale=scales[0],
            v_scale=scales[1],
            prefix_k=prefix[0],
            prefix_v=prefix[1],
            lengths=lengths,
            block_table=block_table,
            mask=mask,
            max_length=max_length,
            scaling=scaling,
            output_scale=output_scale,
            output_bits=output_bits,
            out=out,
            counters=counters,
            partials=partials,
            stream=stream,
        )


def _dense_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, prefix: int, scaling: float
) -> Tensor:
    """q [B, Hq, T, D], keys [B, Hkv, P + S, D], mask bool [B or 1, 1, T, S] -> [B, T, Hq, D].

    A row that may attend nothing is zero; what no row may attend is not read as a number.
    """
    seen = F.pad(mask, (prefix, 0), value=True)
    unused = ~seen.any(dim=-2)[..., None]  # [B or 1, 1, P + S, 1]
    values = values.masked_fill(unused, 0.0)
    keys = keys.masked_fill(unused, 0.0)
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=seen, scale=scaling, enable_gqa=q.shape[1] != keys.shape[1]
    )
    out = out.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
    return out.transpose(1, 2)


def _with_prefix(
    prefix: Tensor,
    cache: Tensor,
    scale: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    block_table: Tensor | None = None,
    batch: int | None = None,
) -> Tensor:
    """[prefix | first ``rows`` rows of each sequence] of ``dtype``: [B, Hkv, P + rows, D]."""
    batch = cache.shape[0] if batch is None else batch
    length = prefix.shape[1]
    whole = torch.empty(
        (batch, cache.shape[1], length + rows, prefix.shape[2]), dtype=dtype, device=cache.device
    )
    whole[:, :, :length] = prefix
    dequantized_rows(cache, scale, whole[:, :, length:], block_table)
    return whole


def _kv_attention(
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
    if q.dim() != 4:
        raise ValueError(f"kv_attention: q: expected 4 dimensions, got shape {list(q.shape)}")
    batch, heads, tokens, dim = q.shape
    cached = k.shape[2] if k.dim() == 4 else 0
    if tokens <= PACKED_QUERY_TOKENS and kernel_takes(q, k):
        out = q.new_empty((batch, tokens, heads, dim))
        launch_attention(
            "kv_attention",
            q.transpose(1, 2),
            (k, v),
            (k_scale, v_scale),
            (prefix_k, prefix_v),
            max_length=cached,
            mask=mask,
            scaling=scaling,
            out=out,
        )
        return out
    if mask is None:
        mask = torch.ones(tokens, cached, dtype=torch.bool, device=q.device)
        mask = mask.tril(cached - tokens)[None, None]
    keys = _with_prefix(prefix_k, k, k_scale, cached, q.dtype)
    values = _with_prefix(prefix_v, v, v_scale, cached, q.dtype)
    return _dense_attention(q, keys, values, mask, prefix_k.shape[1], scaling).contiguous()


def _kv_decode_attention(
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
    output_scale: Tensor | None,
    output_bits: int,
) -> Tensor:
    out = empty_output(q, output_scale)
    check_types("kv_decode_attention", q, k_cache, kv_bits)
    if kernel_takes(q, k_cache):
        launch_attention(
            "kv_decode_attention",
            q[:, None],
            (k_cache, v_cache),
            (k_scale, v_scale),
            (prefix_k, prefix_v),
            max_length=max_length,
            lengths=lengths,
            block_table=block_table,
            scaling=scaling,
            output_scale=output_scale,
            output_bits=output_bits,
            out=out,
        )
        return out
    # Outside the kernel's types and sizes: all rows up to max_length unpacked, the rest masked.
    batch = q.shape[0]
    rows = (prefix_k, k_cache, k_scale), (prefix_v, v_cache, v_scale)
    if block_table is not None:  # entries behind a sequence's length may be anything
        used = torch.arange(block_table.shape[1], device=q.device) * k_cache.shape[2]
        block_table = block_table.where(used < lengths[:, None], 0)
    keys, values = (
        _with_prefix(*r, max_length, q.dtype, block_table=block_table, batch=batch) for r in rows
    )
    mask = torch.arange(max_length, device=q.device) < lengths[:, None, None, None]
    dense = _dense_attention(q[:, :, None], keys, values, mask, prefix_k.shape[1], scaling)
    dense = dense.reshape(out.shape)
    if output_scale is None:
        return out.copy_(dense)
    level = 2 ** (output_bits - 1)
    q8 = (dense.float() * (1.0 / output_scale)).round().clamp(-level, level - 1)
    return out.copy_(q8.nan_to_num(nan=0.0))


implement("kv_attention", _kv_attention)
implement("kv_decode_attention", _kv_decode_attention)
