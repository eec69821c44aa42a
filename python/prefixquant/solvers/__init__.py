# SPDX-License-Identifier: Apache-2.0
"""Weight solvers: W [N, K] and the Hessian of its inputs -> integers and scales."""

from prefixquant.solvers.gptq import solve_gptq
from prefixquant.solvers.quantease import solve_quantease
from prefixquant.solvers.rtn import solve_rtn
from prefixquant.solvers.select import WeightSolver
from prefixquant.solvers.weight import QuantizedWeight, layer_error

__all__ = [
    "QuantizedWeight",
    "WeightSolver",
    "layer_error",
    "solve_gptq",
    "solve_quantease",
    "solve_rtn",
]
