# SPDX-License-Identifier: Apache-2.0
"""`prefixquant.solvers.columns.round_columns` as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixquant.quantizer import qrange

_ROWS = 32  # rows of the weight a program walks
_WARPS = 1  # a thread a row: a column's sum needs no other thread

# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to an integer, half to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _round_columns(  # noqa: PLR0913 - pointers and sizes
    base,  # float32 [B, N]
    steps,  # float32, [B, N] by steps_stride
    reference,  # float32 [B, N]; base again if not HAS_REFERENCE
    free,  # int8 [B, N]: 1 where a value is not rounded; base again if not HAS_FREE
    mixing,  # float32 [B, B]: mixing[j, i] is the weight of column i's change in column j
    levels,  # float32 [B, N], the result
    rows,  # N
    steps_stride,  # elements between two columns of steps, 0 if they share their scales
    qmin: tl.constexpr,
    qmax: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_FREE: tl.constexpr,
    COUNT: tl.constexpr,  # B
    COLUMNS: tl.constexpr,  # B, rounded up to a power of 2
    ROWS: tl.constexpr,
):
    """One program walks ROWS rows of the weight through all B columns.

    The changes of the columns done so far stay in registers, [COLUMNS, ROWS]; a column's sum over
    them is a reduction. Columns not done yet have a change of 0.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    index = tl.arange(0, COLUMNS)
    changes = tl.zeros((COLUMNS, ROWS), tl.float32)
    for j in range(COUNT):
        x = tl.load(base + j * rows + row, mask=inside, other=0.0)
        step = tl.load(steps + j * steps_stride + row, mask=inside, other=1.0)
        weights = tl.load(mixing + j * COUNT + index, mask=index < j, other=0.0)
        x += tl.sum(changes * weights[:, None], axis=0)
        exact = x / step
        level = tl.minimum(tl.maximum(exact, qmin), qmax)
        level = (level + _ROUNDER) - _ROUNDER
        if HAS_FREE:
            is_free = tl.load(free + j * rows + row, mask=inside, other=0)
            level = tl.where(is_free != 0, exact, level)
        tl.store(levels + j * rows + row, level, mask=inside)
        before = x
        if HAS_REFERENCE:
            before = tl.load(reference + j * rows + row, mask=inside, other=0.0)
        changes = tl.where((index == j)[:, None], (level * step - before)[None, :], changes)


def round_columns_triton(
    base: Tensor,
    steps: Tensor,
    mixing: Tensor,
    bits: int,
    reference: Tensor | None,
    free: Tensor | None,
) -> Tensor:
    """See `prefixquant.solvers.columns.round_columns`; steps is [B, N], of any stride over B."""
    columns, rows = base.shape
    qmin, qmax = qrange(bits)
    base, mixing = base.contiguous(), mixing.T.contiguous()
    if steps.stride(1) != 1:
        steps = steps.contiguous()
    levels = torch.empty_like(base)
    grid = (triton.cdiv(rows, _ROWS),)
    with torch.cuda.device_of(base):  # Triton launches on the current device
        _round_columns[grid](
            base,
            steps,
            base if reference is None else reference.contiguous(),
            base if free is None else free.contiguous().view(torch.int8),
            mixing,
            levels,
            rows,
            steps.stride(0),
            qmin,
            qmax,
            HAS_REFERENCE=reference is not None,
            HAS_FREE=free is not None,
            COUNT=columns,
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=_ROWS,
            num_warps=_WARPS,
        )
    return levels
