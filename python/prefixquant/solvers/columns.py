# SPDX-License-Identifier: Apache-2.0
"""Rounding columns one after the other, each passing its error on to those behind it.

The loop that GPTQ and coordinate descent share. Rows are independent, so on a GPU each program of
one Triton kernel walks the columns of its rows; without Triton the same steps are torch operations.
"""

import functools
import os
import shutil

import torch
from torch import Tensor

from prefixquant.quantizer import qrange


def round_columns(
    base: Tensor,
    steps: Tensor,
    mixing: Tensor,
    bits: int,
    reference: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """For j = 0 .. B-1: ``q_j = clamp(rint(x_j / s_j))`` with
    ``x_j = base_j + sum_{i<j} mixing_ij (q_i s_i - r_i)``.

    ``r`` is ``reference``, the values that columns had before (coordinate descent), or without one
    ``x`` itself (GPTQ: what is passed on is the rounding error).

    Args:
        base: float32 [B, N], a column of the weight in each row.
        steps: float32 [B, N] or [1, N], the scales.
        mixing: float32 [B, B]; only what is above the diagonal is read.
        bits: 2 to 8.
        reference: float32 [B, N].
        free: bool [B, N]: entries that are not rounded, ``q_j = x_j / s_j``.

    Returns:
        The levels q, float32 [B, N].
    """
    steps = steps.expand_as(base)
    if base.device.type == "cuda" and _has_triton():
        from prefixquant.solvers.columns_triton import round_columns_triton

        return round_columns_triton(base, steps, mixing, bits, reference, free)
    return round_columns_torch(base, steps, mixing, bits, reference, free)


def round_columns_torch(
    base: Tensor,
    steps: Tensor,
    mixing: Tensor,
    bits: int,
    reference: Tensor | None,
    free: Tensor | None,
) -> Tensor:
    """`round_columns` as torch operations, on any device."""
    qmin, qmax = qrange(bits)
    values, levels = base.clone(), torch.empty_like(base)
    before = values if reference is None else reference
    for j in range(len(base)):
        exact = torch.div(values[j], steps[j])
        level = torch.round(exact, out=levels[j]).clamp_(qmin, qmax)
        if free is not None:
            torch.where(free[j], exact, level, out=level)
        change = torch.addcmul(-before[j], level, steps[j])
        values[j + 1 :].addr_(mixing[j, j + 1 :], change)
    return levels


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is there, and the C compiler with which it builds a kernel's launcher."""
    from torch.utils._triton import has_triton

    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return has_triton() and any(shutil.which(name) for name in compilers if name)
