# SPDX-License-Identifier: Apache-2.0
"""Round to nearest, with each scale found by a grid search."""

import torch
from torch import Tensor

from prefixquant.quantizer import matmul_dtype, minmax_scale, quantize
from prefixquant.solvers.weight import QuantizedWeight, group_length


def solve_rtn(
    weight: Tensor,
    bits: int,
    hessian: Tensor | None = None,
    ratios: Tensor | None = None,
    group_size: int = 0,
) -> QuantizedWeight:
    """``q = clamp(rint(W / s), qmin, qmax)``, s = r * minmax with r searched for every scale.

    The search minimises ``sum_n (w_n - w_hat_n) H (w_n - w_hat_n)^T``, the squared error of the
    linear's output on inputs with second moments H = X^T X: output channels do not share a term, so
    each finds its own best ratio (PrefixQuant section 5.1 searches one objective per block; this is
    the same error taken at the linear, channel by channel). Groups of a row do share terms; each is
    searched on its own block of the diagonal of H, as if the others were exact.

    Args:
        weight: float [N, K].
        bits: 2 to 8.
        hessian: float [K, K], or None for the identity (plain weight error).
        ratios: candidates; None takes 1.0 down to 0.5 (0.3 under 4 bits) in steps of 0.025.
        group_size: columns that share a scale; 0: one scale a row.
    """
    length = group_length(weight.shape[1], group_size)
    if ratios is None:
        ratios = torch.linspace(1.0, 0.5, 21) if bits >= 4 else torch.linspace(1.0, 0.3, 29)
    groups = weight.float().unflatten(1, (-1, length)).transpose(0, 1)  # [G, N, length]
    start = minmax_scale(groups.abs().amax(dim=2), bits)
    if hessian is not None:
        metric = _diagonal_blocks(hessian, length).to(matmul_dtype(weight.device))
    best_scale, best_error = start.clone(), torch.full_like(start, torch.inf)
    for ratio in ratios.tolist():
        scale = start * ratio
        delta = quantize(groups, scale[..., None], bits).mul_(scale[..., None]).sub_(groups)
        moved = delta if hessian is None else (delta.to(metric.dtype) @ metric).float()
        error = (moved * delta).sum(dim=2)
        better = error < best_error
        best_scale[better], best_error[better] = scale[better], error[better]
    q = quantize(groups, best_scale[..., None], bits).to(torch.int8)
    scale = best_scale.T.contiguous()  # [N, G]
    return QuantizedWeight(
        q.transpose(0, 1).flatten(1).contiguous(), scale if group_size else scale[:, 0], bits
    )


def _diagonal_blocks(hessian: Tensor, length: int) -> Tensor:
    """[K, K] -> [K / length, length, length]."""
    parts = hessian.split(length)
    return torch.stack([rows.split(length, dim=1)[i] for i, rows in enumerate(parts)])
