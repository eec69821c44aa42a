# SPDX-License-Identifier: Apache-2.0
"""GPTQ: columns are rounded one after the other, and those left make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, with columns in the order of falling diag(H) (its "act order") and static scales.
"""

import torch
from torch import Tensor

from prefixquant.solvers.columns import round_columns
from prefixquant.solvers.rtn import solve_rtn
from prefixquant.solvers.weight import DAMPING, QuantizedWeight, column_scales, damped, row_errors

# Of the scales that suit rounding to nearest. SmolLM2-135M, 3 bits: 3 to 8 percent less error than
# with 1.0 alone, and GPTQ is a small part of the time of a quantization.
MULTIPLIERS = (1.0, 0.8, 0.9, 1.1)
_ROWS = 8192  # rows rounded at once, times the multipliers
_INVERTED = 2048  # columns of an inverse that are solved for at once
_BLOCK = 128  # columns rounded between two matrix products with all columns left


def solve_gptq(
    weight: Tensor,
    bits: int,
    hessian: Tensor,
    *,
    group_size: int = 0,
    multipliers: tuple[float, ...] = MULTIPLIERS,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """Approximately minimises ``sum_n (w_n - w_hat_n) H (w_n - w_hat_n)^T`` over the integers.

    Args:
        weight: float [N, K].
        bits: 2 to 8.
        hessian: float [K, K], second moments of the inputs.
        group_size: columns that share a scale; 0: one scale a row.
        multipliers: tried on the scales that suit rounding to nearest; each row keeps its best.
        damping: see `damped`.
    """
    weight, hessian = weight.float(), damped(hessian, damping)
    scale = solve_rtn(weight, bits, hessian, group_size=group_size).scale
    levels, scale = round_at_best_scales(weight, scale, bits, hessian, multipliers)
    return QuantizedWeight(levels.to(torch.int8), scale, bits)


def round_at_best_scales(
    weight: Tensor,
    scale: Tensor,
    bits: int,
    hessian: Tensor,
    multipliers: tuple[float, ...] = MULTIPLIERS,
    free: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GPTQ at each multiple of ``scale``, [N] or [N, G]; every row keeps its best.

    Args:
        weight: float32 [N, K]; hessian: damped; free: bool [N, K], entries that are not rounded.

    Returns:
        levels, float32 [N, K], and their scales.
    """
    order, factor = inverse_factor(hessian)
    best_levels, best_scale = torch.empty_like(weight), torch.empty_like(scale)
    repeats = len(multipliers)
    # All multiples at once: a GPU walks the columns of few rows as slowly as those of many.
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        tried = torch.cat([scale[rows] * multiplier for multiplier in multipliers])
        target, steps = weight[rows].repeat(repeats, 1), column_scales(tried, weight.shape[1])
        mask = None if free is None else free[rows].repeat(repeats, 1)
        levels = gptq_levels(target, steps, bits, order, factor, mask)
        errors = row_errors(levels * steps - target, hessian).view(repeats, -1)
        count = errors.shape[1]
        chosen = errors.argmin(dim=0) * count + torch.arange(count, device=errors.device)
        best_levels[rows], best_scale[rows] = levels[chosen], tried[chosen]
    return best_levels, best_scale


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The column order, int64 [K], and the upper triangular U [K, K] with ``U^T U = H^-1`` in that
    order, by float64.

    H = L L^T with the order reversed makes H = R R^T, R = L with rows and columns reversed, and
    U = R^-1: one factorization, and never more than two float64 matrices of H's size.
    """
    order = hessian.diagonal().argsort(descending=True)
    rising = order.flip(0)
    wide = hessian[rising][:, rising].double()
    lower = torch.linalg.cholesky(wide)
    del wide
    inverse = torch.zeros_like(hessian)  # L^-1, by columns: those from j on need L[j:, j:] alone
    for start in range(0, len(lower), _INVERTED):
        count = len(lower) - start
        columns = torch.eye(count, min(_INVERTED, count), dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower[start:, start:], columns, upper=False)
        inverse[start:, start : start + _INVERTED] = solved
    return order, inverse.flip(0, 1)


def gptq_levels(
    weight: Tensor,
    scales: Tensor,
    bits: int,
    order: Tensor,
    factor: Tensor,
    free: Tensor | None = None,
) -> Tensor:
    """GPTQ's loop: the levels, float32 [N, K].

    Args:
        weight: float32 [N, K].
        scales: float32 [N, 1] or [N, K].
        order, factor: of `inverse_factor`.
        free: bool [N, K], the entries that are not rounded.
    """
    columns = weight.T[order].contiguous()  # [K, N]: a column is a contiguous row
    steps = scales.T if scales.shape[1] == 1 else scales.T[order]
    free = None if free is None else free.T[order]
    unit = factor / factor.diagonal()[:, None]
    levels = torch.empty_like(columns)
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(columns)))
        here = steps if len(steps) == 1 else steps[block]
        # An error e_j = x_j - q_j s_j moves the columns behind it by -e_j U_jk / U_jj.
        inside = unit[block, block]
        levels[block] = round_columns(
            columns[block], here, inside, bits, free=None if free is None else free[block]
        )
        # Those errors again, now as one solve: x = w - U^T e holds within the block.
        errors = columns[block] - levels[block] * here
        errors = torch.linalg.solve_triangular(inside.T, errors, upper=False, unitriangular=True)
        columns[block.stop :].addmm_(unit[block, block.stop :].T, errors, alpha=-1)
    q = torch.empty_like(levels)
    q[order] = levels
    return q.T.contiguous()
