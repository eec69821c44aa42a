# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementation of kv_prefill_attention.

The sequences of a call are cut into runs that attend together (`runs_of`). A run of a few tokens
each reads the packed cache (`kv_attention_cuda`). Else it is unpacked once, and torch's attention
takes it: cuDNN's for equal prompts of much work that begin at row 0, on a Hopper GPU or later;
FlashAttention 2 for the others, which may be of different lengths.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

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
from prefixquant.ops.kv_prefill_attention import KvPrefillAttentionArguments, check_counts
from prefixquant.ops.kv_quant_cuda import dequantized_rows

_CUDNN_DIM = 128  # largest head dimension
# cuDNN makes a plan for every new shape, which takes 50 ms. So lengths are rounded up, to a 32nd of
# the power of two above them, and runs of less work (sequences * tokens^2) go without: at this much
# it saves 80 us of a layer with 32 heads of 128 (H100).
_CUDNN_PARTS, _CUDNN_LEAST_ROWS = 32, 64
_CUDNN_LEAST_WORK = 1 << 22
# Sequences of different lengths are unpacked as if all were as long as the longest. It may be so
# many times the rows that are needed, and these: few bytes beside those of the other operations.
_RAGGED_TIMES, _RAGGED_ROWS = 2, 2048


@dataclass(frozen=True)
class Run:
    """Sequences that attend together."""

    first: int  # the first of them, counted from that of the call
    row: int  # its first row of q
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @functools.cached_property
    def sequences(self) -> int:
        return len(self.counts)

    @functools.cached_property
    def tokens(self) -> int:
        return sum(self.counts)

    @functools.cached_property
    def ends(self) -> list[int]:
        """Rows of the cache that each has."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]

    @functools.cached_property
    def equal(self) -> bool:
        return len(set(zip(self.starts, self.counts, strict=True))) == 1

    @functools.cached_property
    def work(self) -> int:
        return sum(count * end for count, end in zip(self.counts, self.ends, strict=True))

    def joined(self, other: "Run") -> "Run":
        return Run(self.first, self.row, self.starts + other.starts, self.counts + other.counts)


@functools.lru_cache(maxsize=64)  # every layer asks for the same
def runs_of(
    starts: tuple[int, ...], counts: tuple[int, ...], ragged: bool, least_work: int
) -> list[Run]:
    """The runs of a call's sequences; those without tokens are in none.

    Neighbours of equal start and count are one run. With ``ragged`` so are different ones, as long
    as none of them has ``least_work``.
    """
    runs: list[Run] = []
    rows = itertools.accumulate(counts, initial=0)
    for index, (start, count, row) in enumerate(zip(starts, counts, rows, strict=False)):
        one = Run(index, row, (start,), (count,))
        if count and not (runs and _join_last(runs, one, runs[-1].joined(one).equal)):
            runs.append(one)
    joined: list[Run] = runs[:1]
    for run in runs[1:]:
        alone = any(r.equal and r.work >= least_work for r in (joined[-1], run))
        may = ragged and not alone and _padding_is_small(joined[-1].joined(run))
        if not _join_last(joined, run, may):
            joined.append(run)
    return joined


def _join_last(runs: list[Run], run: Run, allowed: bool) -> bool:
    """Puts ``run`` to the last one where that is allowed and they are neighbours."""
    if not allowed or runs[-1].first + runs[-1].sequences != run.first:
        return False
    runs[-1] = runs[-1].joined(run)
    return True


def _padding_is_small(run: Run) -> bool:
    return run.sequences * max(run.ends) <= _RAGGED_TIMES * sum(run.ends) + _RAGGED_ROWS


@functools.cache
def _cudnn_is_there(device: int) -> bool:
    # Before Hopper it is not ahead of FlashAttention 2.
    return (
        hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(device)[0] >= 9
    )


def _takes_cudnn(q: Tensor, run: Run) -> bool:
    # Its causal mask is aligned to the upper left: query i sees keys 0 to i.
    return (
        run.starts[0] == 0
        and run.work >= _CUDNN_LEAST_WORK
        and _takes_flash(q)
        and q.shape[-1] <= _CUDNN_DIM
        and torch.backends.cuda.cudnn_sdp_enabled()
        and _cudnn_is_there(q.device.index)
    )


def _takes_flash(q: Tensor) -> bool:
    return q.dtype != torch.float32 and q.shape[-1] % 8 == 0


def _cudnn_rows(rows: int) -> int:
    step = max(_CUDNN_LEAST_ROWS, (1 << (rows - 1).bit_length()) // _CUDNN_PARTS)
    return -(-rows // step) * step


def _pages(a: KvPrefillAttentionArguments, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k_cache, v_cache, block table or None) that begin at the run's first sequence."""
    own = slice(a.sequence + run.first, a.sequence + run.first + run.sequences)
    if a.block_table is None:
        return a.k_cache[own], a.v_cache[own], None
    return a.k_cache, a.v_cache, a.block_table[own]


def _unpack_into(whole: Tensor, a: KvPrefillAttentionArguments, run: Run, rows: int) -> None:
    """[prefix | first ``rows`` rows] of every sequence into whole [2, B, Hkv, P + rows, D]."""
    prefix = a.prefix_k.shape[1]
    k_pages, v_pages, table = _pages(a, run)
    if table is not None and not run.equal:  # entries behind a sequence's end may be anything
        used = torch.arange(table.shape[1], device=table.device) * a.k_cache.shape[2]
        table = table.where(used < _lengths(run, 0, table.device).ends[:, None], 0)
    if prefix:
        whole[0, :, :, :prefix] = a.prefix_k
        whole[1, :, :, :prefix] = a.prefix_v
    dequantized_rows(k_pages, a.k_scale, whole[0, :, :, prefix:], table)
    dequantized_rows(v_pages, a.v_scale, whole[1, :, :, prefix:], table)


def _attend_cudnn(a: KvPrefillAttentionArguments, q: Tensor, run: Run) -> Tensor:
    """[B, T, Hq, D]; rows that stand for the prefix are in front of the queries, and dropped."""
    batch, tokens, heads, dim = q.shape
    prefix = a.prefix_k.shape[1]
    last = prefix + tokens
    total = _cudnn_rows(last)
    whole = q.new_empty((2, batch, a.prefix_k.shape[0], total, dim))
    _unpack_into(whole[..., :last, :], a, run, tokens)
    if total != tokens:
        padded = q.new_empty((batch, total, heads, dim))
        padded[:, :prefix].zero_()
        padded[:, prefix:last] = q
        padded[:, last:].zero_()
        whole[..., last:, :].zero_()
        q = padded
    attended = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2),
        whole[0],
        whole[1],
        None,  # attn_bias
        False,  # compute_log_sumexp
        0.0,  # dropout_p
        True,  # is_causal
        False,  # return_debug_mask
        scale=a.scaling,
    )[0]
    return attended.transpose(1, 2)[:, prefix:last]


def _attend_equal(a: KvPrefillAttentionArguments, q: Tensor, run: Run) -> Tensor:
    """[B, T, Hq, D] by the attention that torch has for these types, lower-right aligned."""
    batch, tokens, heads, dim = q.shape
    rows = a.prefix_k.shape[1] + run.ends[0]
    keys, values = whole = q.new_empty((2, batch, a.prefix_k.shape[0], rows, dim))
    _unpack_into(whole, a, run, run.ends[0])
    queries = q.transpose(1, 2)
    if _takes_flash(q):
        # Aligned to the lower right as FlashAttention 2 is; grouped heads need no copies there.
        attended = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, True, False, scale=a.scaling
        )[0]
    else:
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=causal_lower_right(tokens, rows),
            scale=a.scaling,
            enable_gqa=heads != keys.shape[1],
        )
    return attended.transpose(1, 2)


class _Lengths(NamedTuple):
    """int32, on the device."""

    queries: Tensor  # [B + 1], where each sequence's begin
    keys: Tensor  # [B + 1], where each sequence's [prefix | longest end] begins
    seen: Tensor  # [B], prefix and end
    ends: Tensor  # [B]


@functools.lru_cache(maxsize=16)  # every layer asks for the same
def _lengths(run: Run, prefix: int, device: torch.device) -> _Lengths:
    ends = torch.tensor(run.ends)
    queries = F.pad(torch.tensor(run.counts).cumsum(0), (1, 0))
    keys = torch.arange(run.sequences + 1) * (prefix + max(run.ends))
    return _Lengths(*(t.int().to(device) for t in (queries, keys, prefix + ends, ends)))


def _attend_ragged(a: KvPrefillAttentionArguments, q: Tensor, run: Run) -> Tensor:
    """[T, Hq, D] by FlashAttention 2, of q [T, Hq, D]."""
    rows, prefix = max(run.ends), a.prefix_k.shape[1]
    heads, dim = a.prefix_k.shape[0], q.shape[2]
    whole = q.new_empty((2, run.sequences, prefix + rows, heads, dim))
    _unpack_into(whole.transpose(2, 3), a, run, rows)
    keys, values = whole.flatten(1, 2)
    lengths = _lengths(run, prefix, q.device)
    return torch.ops.aten._flash_attention_forward(
        q,
        keys,
        values,
        lengths.queries,
        lengths.keys,
        max(run.counts),
        prefix + rows,
        0.0,  # dropout_p
        True,  # is_causal, aligned to the lower right of each sequence
        False,  # return_debug_mask
        scale=a.scaling,
        seqused_k=lengths.seen,
    )[0]


def _attend_packed(a: KvPrefillAttentionArguments, q: Tensor, run: Run, out: Tensor) -> None:
    """q [B, T, Hq, D] -> out [B * T, Hq * D] by the kernel that reads the packed cache."""
    k_pages, v_pages, table = _pages(a, run)
    launch_attention(
        "kv_prefill_attention",
        q,
        (k_pages, v_pages),
        (a.k_scale, a.v_scale),
        (a.prefix_k, a.prefix_v),
        max_length=run.ends[0],
        block_table=table,
        scaling=a.scaling,
        output_scale=a.output_scale,
        output_bits=a.output_bits,
        out=out,
    )


def _attend_run(a: KvPrefillAttentionArguments, q: Tensor, run: Run, out: Tensor) -> None:
    """q [T, Hq, D] -> out [T, Hq * D]"""
    if not run.equal:
        _finish(a, _attend_ragged(a, q, run)[None], out)
        return
    by_sequence = q.view(run.sequences, run.counts[0], *q.shape[1:])
    if run.counts[0] <= PACKED_QUERY_TOKENS and kernel_takes(q, a.k_cache):
        _attend_packed(a, by_sequence, run, out)
        return
    attend = _attend_cudnn if _takes_cudnn(q, run) else _attend_equal
    _finish(a, attend(a, by_sequence, run), out)


def _finish(a: KvPrefillAttentionArguments, attended: Tensor, out: Tensor) -> None:
    """attended [B, T, Hq, D] -> out [B * T, Hq * D], quantized where there is a scale."""
    if a.output_scale is None:
        out.view(attended.shape).copy_(attended)
        return
    # The rows of one sequence lie at one distance, those of all of them may not.
    parts = out.view(*attended.shape[:2], out.shape[1])
    whole = attended.is_contiguous()
    for x, q in [(attended, out)] if whole else zip(attended, parts, strict=True):
        rows = x.reshape(q.shape)
        launch("quantize_static", rows, x=rows, scale=a.output_scale, bits=a.output_bits, q=q)


def _check_rows(a: KvPrefillAttentionArguments) -> None:
    pages = 1 if a.block_table is None else a.block_table.shape[1]
    capacity = a.k_cache.shape[2] * pages
    for start, count in zip(a.starts, a.counts, strict=True):
        if start < 0 or start + count > capacity:
            raise ValueError(
                "kv_prefill_attention: start: expected the tokens to lie in rows 0 to "
                f"{capacity - 1}, got {start}"
            )
    owners = a.k_cache if a.block_table is None else a.block_table
    if not 0 <= a.sequence <= owners.shape[0] - len(a.counts):
        raise ValueError(
            f"kv_prefill_attention: sequence: expected {len(a.counts)} of the {owners.shape[0]} "
            f"sequences, got those from {a.sequence} on"
        )


def _kv_prefill_attention(*arguments) -> Tensor:
    a = KvPrefillAttentionArguments(*arguments)
    out = empty_output(a.q, a.output_scale)
    check_types("kv_prefill_attention", a.q, a.k_cache, a.kv_bits)
    check_counts(a.q, a.starts, a.counts)
    _check_rows(a)
    numbers = tuple(a.starts), tuple(a.counts)
    for run in runs_of(*numbers, _takes_flash(a.q), _CUDNN_LEAST_WORK):
        own = slice(run.row, run.row + run.tokens)
        _attend_run(a, a.q[own], run, out[own])
    return out


implement("kv_prefill_attention", _kv_prefill_attention)
