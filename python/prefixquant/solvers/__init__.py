# SPDX-License-Identifier: Apache-2.0
"""Weight solvers: W [N, K] and the Hessian of its inputs -> integers and scales."""

from prefixquant.solvers.gptq import solve_gptq
from prefixquant.solvers.quantease import solve_quantease
from prefixquant.solvers.quantease_outlier import solve_quantease_outlier
from prefixquant.solvers.rtn import solve_rtn
from prefixquant.solvers.select import WeightSolver
from prefixquant.solvers.weight import Outliers, QuantizedWeight, layer_error

__all__ = [
    "Outliers",
    "QuantizedWeight",
    "WeightSolver",
    "layer_error",
    "solve_gptq",
    "solve_quantease",
    "solve_quantease_outlier",
    "solve_rtn",
]
