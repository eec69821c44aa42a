# SPDX-License-Identifier: Apache-2.0
"""Weights that make up for the errors of the quantization before them.

In the quantized model a linear meets other inputs X than in the float model, and where it adds to
the residual stream, a stream that is off already. Its float weights W are then not the best ones.
With T the outputs that would put things right, the weights wanted are the ridge regression

    W' = argmin |X W'^T - T|^2 / n + lambda |W' - W|^2  =  W + C (H + lambda I)^-1,
    C = (T - X W^T)^T X / n,   H = X^T X / n,   lambda = strength * mean(diag H),

and what a solver rounds is W', with the same H. One linear solve a point, no gradients. GPTAQ
(arXiv 2504.02692) corrects for the inputs too, inside GPTQ's loop; taking the target apart from the
solver serves every solver and lets o_proj and down_proj aim at the float residual stream itself.
"""

import torch
from torch import Tensor


def input_shortfall(weight: Tensor, floating: Tensor, rows: Tensor, hessian: Tensor) -> Tensor:
    """C [N, K] of linears that should give what they give on the float model's inputs.

    Args:
        weight: float [N, K], the rows of all linears that read this input.
        floating: their inputs in the float model [n, K].
        rows: their inputs in the quantized model [n, K].
        hessian: ``rows^T rows / n`` [K, K].
    """
    return weight @ (floating.T @ rows / len(rows) - hessian)


def output_shortfall(weight: Tensor, target: Tensor, rows: Tensor, hessian: Tensor) -> Tensor:
    """C [N, K] of a linear whose outputs should be ``target`` [n, N], a bias not counted."""
    return target.T @ rows / len(rows) - weight @ hessian


def compensate(weight: Tensor, hessian: Tensor, shortfall: Tensor, strength: float) -> Tensor:
    """``W + C (H + strength * mean(diag H) * I)^-1``, in the dtype of W; solved in float64.

    Args:
        weight: float [N, K].
        hessian: float [K, K], symmetric, positive semidefinite.
        shortfall: C [N, K] of `input_shortfall` or `output_shortfall`.
        strength: above 0. The larger, the nearer to W.
    """
    wide = hessian.to(torch.float64, copy=True)
    ridge = strength * wide.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    wide.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(wide)
    del wide  # 6.6 GB at K = 28672
    step = torch.cholesky_solve(shortfall.double().T, factor).T
    return weight + step.to(weight.dtype)
