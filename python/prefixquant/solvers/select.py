# SPDX-License-Identifier: Apache-2.0
"""A solver by its name, for all linears that share their input."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.config import SOLVERS
from prefixquant.solvers.gptq import solve_gptq
from prefixquant.solvers.quantease import solve_quantease
from prefixquant.solvers.quantease_outlier import solve_quantease_outlier
from prefixquant.solvers.rtn import solve_rtn
from prefixquant.solvers.weight import QuantizedWeight


@dataclass(frozen=True)
class WeightSolver:
    """``name`` is one of `prefixquant.config.SOLVERS`; ``group_size`` 0 is one scale a row;
    ``outlier_fraction`` is that of quantease-outlier."""

    name: str = "gptq"
    group_size: int = 0
    outlier_fraction: float = 0.0

    def __call__(self, weights: list[Tensor], bits: int, hessian: Tensor) -> list[QuantizedWeight]:
        """Weights [N_i, K] that read the same input are solved as one: their rows are independent
        of each other, and the work that depends on the Hessian alone is done once. But outliers
        compete within a weight, so that each has its share of them."""
        options = {"group_size": self.group_size}
        if self.name == "quantease-outlier":
            options["fraction"] = self.outlier_fraction
            return [solve_quantease_outlier(weight, bits, hessian, **options) for weight in weights]
        rows = torch.cat(weights)
        if self.name == "rtn":
            solved = solve_rtn(rows, bits, hessian, **options)
        elif self.name == "gptq":
            solved = solve_gptq(rows, bits, hessian, **options)
        elif self.name == "quantease":
            solved = solve_quantease(rows, bits, hessian, **options)
        else:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {self.name!r}")
        return solved.rows(*map(len, weights))
