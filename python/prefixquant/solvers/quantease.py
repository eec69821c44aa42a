# SPDX-License-Identifier: Apache-2.0
"""QuantEase: cyclic coordinate descent on the integers of a layer.

Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.quantizer import qrange
from prefixquant.solvers.gptq import DAMPING, solve_gptq
from prefixquant.solvers.weight import QuantizedWeight, column_scales, damped, row_errors

SWEEPS = 25
# SmolLM2-135M, 3 bits, |(W_hat - W) X^T|^2 / |W X^T|^2 of the o, up, down and v of four
# blocks: 2 to 5 percent lower with every third sweep relaxed than with none.
_RELAX_EVERY = 3
_SETTLING = 4  # the last sweeps, never relaxed
_BLOCK = 64  # columns swept one after the other between two matrix products


@dataclass(frozen=True)
class Sweep:
    """The objective ``sum_n d_n H d_n^T`` after one sweep and its scales.

    ``objective`` is that of the state, ``kept`` that of the best quantized rows so far.
    """

    relaxed: bool
    objective: float
    kept: float


def solve_quantease(
    weight: Tensor,
    bits: int,
    hessian: Tensor,
    *,
    group_size: int = 0,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
    history: list[Sweep] | None = None,
) -> QuantizedWeight:
    """Minimises ``sum_n (w_n - w_hat_n) H (w_n - w_hat_n)^T`` by coordinate descent from GPTQ's
    solution.

    In a quantized sweep each column j moves to ``Q(w_hat_j - (d H)_j / H_jj)``, its best levels
    while the others stay, and then each scale to its best value for the levels: neither can raise
    the objective. Every third sweep leaves the rounding out, which carries the next ones out of the
    local minimum; each row keeps the best quantized state it has seen, so the result is never worse
    than GPTQ's.

    Args:
        weight: float [N, K].
        bits: 2 to 8.
        hessian: float [K, K], second moments of the inputs.
        group_size: columns that share a scale; 0: one scale a row.
        sweeps: over all columns.
        damping: see `damped`.
        history: receives one `Sweep` after each.
    """
    start = solve_gptq(weight, bits, hessian, group_size=group_size, damping=damping)
    state = Descent(weight.float(), start, damped(hessian, damping))
    kept = _Best(state)
    for index in range(sweeps):
        relaxed = index % _RELAX_EVERY == _RELAX_EVERY - 1 and index < sweeps - _SETTLING
        state.sweep(relaxed)
        if not relaxed:
            state.refit_scales()
        errors = state.errors()
        if not relaxed:
            kept.update(state, errors)
        if history is not None:
            history.append(Sweep(relaxed, errors.sum().item(), kept.errors.sum().item()))
    scale = kept.scale if group_size else kept.scale[:, 0]
    return QuantizedWeight(kept.levels.to(torch.int8), scale.contiguous(), bits)


class _Best:
    """Per row the quantized state with the least error so far."""

    def __init__(self, state: "Descent"):
        self.levels = state.levels.clone()
        self.scale = state.scale.clone()
        self.errors = state.errors()

    def update(self, state: "Descent", errors: Tensor) -> None:
        better = errors < self.errors
        for kept, new in (
            (self.levels, state.levels),
            (self.scale, state.scale),
            (self.errors, errors),
        ):
            kept[better] = new[better]


class Descent:
    """The state of a coordinate descent: ``levels`` [N, K] (integers, but for a relaxed sweep),
    ``scale`` [N, G], and ``delta = levels * scale - target`` [N, K]; all float32."""

    def __init__(self, target: Tensor, start: QuantizedWeight, hessian: Tensor):
        self.target = target
        self.hessian = hessian
        self.bits = start.bits
        self.levels = start.q.float()
        self.scale = start.scale.reshape(len(target), -1).clone()
        self.length = target.shape[1] // self.scale.shape[1]
        self.update_delta()

    def update_delta(self) -> None:
        self.delta = self.levels * column_scales(self.scale, self.levels.shape[1]) - self.target

    def errors(self) -> Tensor:
        return row_errors(self.delta, self.hessian)

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """(group, columns) in their order; a block never crosses a group."""
        for group in range(self.scale.shape[1]):
            first, last = group * self.length, (group + 1) * self.length
            for start in range(first, last, _BLOCK):
                yield group, slice(start, min(start + _BLOCK, last))

    def sweep(self, relaxed: bool = False) -> None:
        """Every column once: to the level of least error, all other columns as they are."""
        for group, block in self.blocks():
            scale = self.scale[:, group]
            # As levels: gradient and Hessian are divided by the scale and by its square.
            gradient = (self.delta @ self.hessian[:, block]).T / scale  # [B, N]
            levels = self.levels[:, block].T.contiguous()
            local = self.hessian[block, block]
            if relaxed:
                _relax_columns(levels, gradient, local)
            else:
                round_columns(levels, gradient, local, self.bits)
            self.levels[:, block] = levels.T
            self.delta[:, block] = levels.T * scale[:, None] - self.target[:, block]

    def refit_scales(self) -> None:
        """Each scale to the minimum of the objective for the levels as they are:
        ``s <- s - (d H u^T) / (u H u^T)`` over the columns of its group, where that is above 0."""
        for group in range(self.scale.shape[1]):
            columns = slice(group * self.length, (group + 1) * self.length)
            u = self.levels[:, columns]
            curvature = row_errors(u, self.hessian[columns, columns])
            slope = ((self.delta @ self.hessian[:, columns]) * u).sum(dim=1)
            old = self.scale[:, group]
            new = old - slope / curvature
            usable = (curvature > 0) & (new > 0.1 * old) & (new < 10 * old)
            new = torch.where(usable, new, old)
            self.scale[:, group] = new
            self.delta[:, columns] = u * new[:, None] - self.target[:, columns]


def round_columns(levels: Tensor, gradient: Tensor, hessian: Tensor, bits: int) -> None:
    """One quantized pass over a block of columns, in place.

    ``u_j <- clamp(rint(u_j - g_j / H_jj))``, then ``g_i += H_ij (change of u_j)`` for i > j.

    Args:
        levels: float32 [B, N]; gradient: float32 [B, N], of half the objective; hessian: [B, B].
    """
    qmin, qmax = qrange(bits)
    inverse = (-1.0 / hessian.diagonal()).tolist()
    for j in range(len(levels)):
        new = torch.add(levels[j], gradient[j], alpha=inverse[j]).round_().clamp_(qmin, qmax)
        change = new - levels[j]
        levels[j] = new
        gradient[j + 1 :].addr_(hessian[j, j + 1 :], change)


def _relax_columns(levels: Tensor, gradient: Tensor, hessian: Tensor) -> None:
    """The same pass without rounding: changes D with ``tril(H) D = -G``, one triangular solve."""
    levels.sub_(torch.linalg.solve_triangular(hessian.tril(), gradient, upper=False))
