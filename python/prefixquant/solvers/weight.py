# SPDX-License-Identifier: Apache-2.0
"""What a weight solver returns, and the objective that all solvers share."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of diag(H), as GPTQ's authors have it


@dataclass
class Outliers:
    """A sparse matrix [N, K] that is added to the quantized weight.

    ``index`` int64 [s], ascending, n * K + k of each entry; ``value`` [s], floats.
    """

    index: Tensor
    value: Tensor


@dataclass
class QuantizedWeight:
    """``W ~ q * scale + outliers``.

    q int8 [N, K] in the range of ``bits``; scale float32 [N], one a row, or [N, G], one for each
    K / G neighbouring columns of a row.
    """

    q: Tensor
    scale: Tensor
    bits: int
    outliers: Outliers | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.q.float() * column_scales(self.scale, self.q.shape[1])
        if self.outliers is not None:
            weight.view(-1)[self.outliers.index] += self.outliers.value.float()
        return weight.to(dtype)

    def rows(self, *counts: int) -> list["QuantizedWeight"]:
        """The weight cut into blocks of rows, without outliers."""
        parts = zip(self.q.split(counts), self.scale.split(counts), strict=True)
        return [replace(self, q=q, scale=scale) for q, scale in parts]


def column_scales(scale: Tensor, columns: int) -> Tensor:
    """scale [N] or [N, G] -> [N, 1] or [N, K], to multiply q with."""
    if scale.dim() == 1:
        return scale[:, None]
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)


def group_length(columns: int, group_size: int) -> int:
    """The columns that share a scale; ``group_size`` 0 is the whole row.

    Raises:
        ValueError: the groups do not fill the row.
    """
    if group_size < 0 or (group_size and columns % group_size):
        raise ValueError(
            f"group_size: expected 0 or a divisor of {columns} input features, got {group_size}"
        )
    return group_size or columns


def outlier_count(shape: tuple[int, int], fraction: float) -> int:
    """How many entries of a weight of that shape stay in high precision.

    Raises:
        ValueError: a fraction that is none.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
    return int(fraction * shape[0] * shape[1])


def row_errors(delta: Tensor, hessian: Tensor) -> Tensor:
    """``d_n H d_n^T`` of every row of delta [N, K]: float32 [N]."""
    return ((delta @ hessian) * delta).sum(dim=1)


def layer_error(weight: Tensor, solved: QuantizedWeight, hessian: Tensor) -> Tensor:
    """``|(W_hat - W) X^T|^2 / |W X^T|^2`` with H = X^T X: float32 []."""
    weight = weight.float()
    error = row_errors(solved.dequantize() - weight, hessian).sum()
    return error / row_errors(weight, hessian).sum().clamp_min(torch.finfo(torch.float32).tiny)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``H + damping * mean(diag H) * I``, float32: the second moments with a little white input.

    It keeps the factorization stable, and a solver from paying for directions that the calibration
    data hardly has. An input that is always zero gets a one, so that H is never singular.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal <= 0] = 1.0
    return hessian
