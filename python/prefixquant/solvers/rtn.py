# SPDX-License-Identifier: Apache-2.0
"""Round to nearest, with each output channel's scale found by a grid search."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.quantizer import matmul_dtype, minmax_scale, quantize


@dataclass
class QuantizedWeight:
    """``W ~ q * scale[:, None]``: q int8 [N, K] in the range of ``bits``, scale float32 [N]."""

    q: Tensor
    scale: Tensor
    bits: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.q.float() * self.scale[:, None]).to(dtype)


def solve_rtn(
    weight: Tensor,
    bits: int,
    hessian: Tensor | None = None,
    ratios: Tensor | None = None,
) -> QuantizedWeight:
    """``q = clamp(rint(W / s), qmin, qmax)``, s = r * minmax with r searched per output channel.

    The search minimises ``sum_n (w_n - w_hat_n) H (w_n - w_hat_n)^T``, the squared error of the
    linear's output on inputs with second moments H = X^T X: output channels do not share a term, so
    each finds its own best ratio (PrefixQuant section 5.1 searches one objective per block; this is
    the same error taken at the linear, channel by channel).

    Args:
        weight: float [N, K].
        bits: 2 to 8.
        hessian: float [K, K], or None for the identity (plain weight error).
        ratios: candidates; None takes 1.0 down to 0.5 in steps of 0.025.
    """
    weight = weight.float()
    if ratios is None:
        ratios = torch.linspace(1.0, 0.5, 21)
    start = minmax_scale(weight.abs().amax(dim=1), bits)
    if hessian is not None:
        metric = hessian.to(matmul_dtype(weight.device))
    best_scale, best_error = start.clone(), torch.full_like(start, torch.inf)
    for ratio in ratios.tolist():
        scale = start * ratio
        delta = quantize(weight, scale[:, None], bits).mul_(scale[:, None]).sub_(weight)
        moved = delta if hessian is None else (delta.to(metric.dtype) @ metric).float()
        error = (moved * delta).sum(dim=1)
        better = error < best_error
        best_scale[better], best_error[better] = scale[better], error[better]
    q = quantize(weight, best_scale[:, None], bits).to(torch.int8)
    return QuantizedWeight(q, best_scale, bits)
