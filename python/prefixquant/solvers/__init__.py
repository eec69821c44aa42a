# SPDX-License-Identifier: Apache-2.0
"""Weight solvers: W [N, K] and the Hessian of its inputs -> integers and per-channel scales."""

from prefixquant.solvers.rtn import QuantizedWeight, solve_rtn

__all__ = ["QuantizedWeight", "solve_rtn"]
