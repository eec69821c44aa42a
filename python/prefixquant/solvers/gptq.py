# SPDX-License-Identifier: Apache-2.0
"""GPTQ: columns are rounded one after the other, and those left make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, with columns in the order of falling diag(H) (its "act order") and static scales.
"""

import torch
from torch import Tensor

from prefixquant.quantizer import qrange
from prefixquant.solvers.rtn import solve_rtn
from prefixquant.solvers.weight import QuantizedWeight, column_scales, damped, row_errors

DAMPING = 0.01
# Of the scales that suit rounding to nearest. SmolLM2-135M, 3 bits: 3 to 8 percent less error than
# with 1.0 alone, and GPTQ is a small part of the time of a quantization.
MULTIPLIERS = (1.0, 0.8, 0.9, 1.1)
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
    weight = weight.float()
    hessian = damped(hessian, damping)
    scale = solve_rtn(weight, bits, hessian, group_size=group_size).scale
    factor = inverse_factor(hessian)
    best = None
    for multiplier in multipliers:
        scales = column_scales(scale * multiplier, weight.shape[1])
        q = round_columns(weight, scales, bits, *factor)
        errors = row_errors(q * scales - weight, hessian)
        if best is None:
            best = [q, scale * multiplier, errors]
            continue
        better = errors < best[2]
        for kept, new in zip(best, (q, scale * multiplier, errors), strict=True):
            kept[better] = new[better]
    return QuantizedWeight(best[0].to(torch.int8), best[1], bits)


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The column order, int64 [K], and the upper triangular U [K, K] with ``U^T U = H^-1`` in that
    order, by float64."""
    order = hessian.diagonal().argsort(descending=True)
    wide = hessian[order][:, order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def round_columns(
    weight: Tensor, scales: Tensor, bits: int, order: Tensor, factor: Tensor
) -> Tensor:
    """GPTQ's loop: float32 integers [N, K].

    Args:
        weight: float32 [N, K].
        scales: float32 [N, 1] or [N, K].
        order, factor: of `inverse_factor`.
    """
    qmin, qmax = qrange(bits)
    columns = weight.T[order].contiguous()  # [K, N]: a column is a contiguous row
    steps = scales.T if scales.shape[1] == 1 else scales.T[order]
    rounded = torch.empty_like(columns)
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, start + _BLOCK)
        inside = factor[block, block] / factor.diagonal()[block, None]
        here = columns[block]
        errors = torch.empty_like(here)
        for j in range(len(here)):
            step = steps[start + j] if len(steps) > 1 else steps[0]
            q = (here[j] / step).round_().clamp_(qmin, qmax)
            rounded[start + j] = q
            errors[j] = here[j] - q * step
            here[j + 1 :].addr_(inside[j, j + 1 :], errors[j], alpha=-1)
        ahead = factor[block, start + len(here) :] / factor.diagonal()[block, None]
        columns[start + len(here) :].addmm_(ahead.T, errors, alpha=-1)
    q = torch.empty_like(rounded)
    q[order] = rounded
    return q.T.contiguous()
