# SPDX-License-Identifier: Apache-2.0
"""QuantEase: cyclic coordinate descent on the integers of a layer.

Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.solvers.columns import round_columns
from prefixquant.solvers.gptq import round_at_best_scales
from prefixquant.solvers.rtn import solve_rtn
from prefixquant.solvers.weight import DAMPING, QuantizedWeight, damped

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
    weight, hessian = weight.float(), damped(hessian, damping)
    scale = solve_rtn(weight, bits, hessian, group_size=group_size).scale
    state = Descent(weight, *round_at_best_scales(weight, scale, bits, hessian), bits, hessian)
    levels, scale = descend(state, sweeps, history)
    return QuantizedWeight(levels.to(torch.int8), scale if group_size else scale[:, 0], bits)


def descend(
    state: "Descent", sweeps: int, history: list[Sweep] | None = None
) -> tuple[Tensor, Tensor]:
    """The sweeps of `solve_quantease`: the best levels [N, K] and scales [N, G] of every row."""
    kept = _Best(state)
    step = {relaxed: Replayed(lambda r=relaxed: _step(state, kept, r)) for relaxed in (True, False)}
    for index in range(sweeps):
        relaxed = index % _RELAX_EVERY == _RELAX_EVERY - 1 and index < sweeps - _SETTLING
        step[relaxed](state.levels.device)
        if history is not None:
            found = state.errors().sum().item()
            history.append(Sweep(relaxed, found, kept.errors.sum().item()))
    return kept.levels.T.contiguous(), kept.scale.T.contiguous()


def _step(state: "Descent", kept: "_Best", relaxed: bool) -> None:
    state.sweep(relaxed)
    if not relaxed:
        kept.update(state, state.refit_scales())


class Replayed:
    """A function without arguments or result that works in place on fixed tensors.

    A sweep is hundreds of small operations. On a GPU they are recorded as a CUDA graph at the
    second call (the first loads what is loaded lazily) and replayed from then on: the launches of a
    sweep then cost the host one.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, device: torch.device) -> None:
        self.calls += 1
        if device.type != "cuda" or self.calls == 1:
            self.function()
            return
        with torch.cuda.device(device):
            if self.graph is None:
                self.graph = self._recorded(_recording_stream(device))
            self.graph.replay()

    def _recorded(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`: it collects garbage and empties the allocator's cache first, which
        # takes longer than the sweeps of a small layer.
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            self.function()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class _Best:
    """Per row of the weight the quantized state with the least error so far, by columns."""

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
            torch.where(better, new, kept, out=kept)


class Descent:
    """The state of a coordinate descent on the weight ``target`` [N, K].

    Held by columns, so that a block of columns is contiguous: ``levels`` [K, N], ``scale`` [G, N],
    and ``delta = levels * scale - target`` [K, N]; all float32. Levels are integers, but for those
    of ``free`` (bool [K, N], or None) and after a relaxed sweep.
    """

    def __init__(
        self,
        target: Tensor,
        levels: Tensor,
        scale: Tensor,
        bits: int,
        hessian: Tensor,
        free: Tensor | None = None,
    ):
        """As a weight: levels [N, K], scale [N] or [N, G], free [N, K]."""
        self.target = target.T.contiguous()
        self.levels = levels.T.float().contiguous()
        self.scale = scale.reshape(len(target), -1).T.contiguous()
        self.bits = bits
        self.hessian = hessian
        self.free = None if free is None else free.T.contiguous()
        self.length = len(self.target) // len(self.scale)
        self.delta = self.levels * self.column_scales() - self.target
        self.moved_target: Tensor | None = None  # H W^T, made when it is first needed
        self.curvature = hessian.diagonal()[:, None]
        # For each block of columns: what a change of column i does to the best value of column j,
        # -H_ij / H_jj, and the changes of a relaxed sweep for a gradient, -tril(H)^-1.
        self.mixing: dict[int, Tensor] = {}
        self.relaxing: dict[int, Tensor] = {}
        for _, block in self.blocks():
            local = hessian[block, block]
            self.mixing[block.start] = (-local / local.diagonal()).contiguous()
            identity = torch.eye(len(local), dtype=torch.float64, device=local.device)
            lower = torch.linalg.solve_triangular(local.double().tril(), identity, upper=False)
            self.relaxing[block.start] = -lower.float()

    def column_scales(self) -> Tensor:
        """[K, N] or, for one scale a row of the weight, [1, N]."""
        return self.scale if len(self.scale) == 1 else self.scale.repeat_interleave(self.length, 0)

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """(group, columns) in their order; a block never crosses a group."""
        for group in range(len(self.scale)):
            first, last = group * self.length, (group + 1) * self.length
            for start in range(first, last, _BLOCK):
                yield group, slice(start, min(start + _BLOCK, last))

    def errors(self) -> Tensor:
        """``d_n H d_n^T`` of every row of the weight: [N]."""
        return ((self.hessian @ self.delta) * self.delta).sum(dim=0)

    def sweep(self, relaxed: bool = False) -> None:
        """Every column once: to the level of least error, all other columns as they are."""
        for group, block in self.blocks():
            steps = self.scale[group]
            before = self.levels[block] * steps  # [B, N]
            gradient = self.hessian[block] @ self.delta
            if relaxed:
                # tril(H) D = -G: each column at its best, the ones before it moved already.
                values = torch.addmm(before, self.relaxing[block.start], gradient)
                torch.div(values, steps, out=self.levels[block])
            else:
                best = torch.addcdiv(before, gradient, self.curvature[block], value=-1)
                free = None if self.free is None else self.free[block]
                self.levels[block] = round_columns(
                    best, steps[None], self.mixing[block.start], self.bits, before, free
                )
            torch.addcmul(-self.target[block], self.levels[block], steps, out=self.delta[block])

    def refit_scales(self) -> Tensor:
        """Each scale to the minimum of the objective for the integers and free values as they are:
        ``s <- s - (d H u^T) / (u H u^T)`` over the columns of its group, where that is above 0.

        Returns:
            `errors` afterwards.
        """
        if len(self.scale) == 1 and self.free is None:
            return self._refit_rows()
        for group in range(len(self.scale)):
            columns = slice(group * self.length, (group + 1) * self.length)
            levels = self.levels[columns]
            free = None if self.free is None else self.free[columns]
            u = levels if free is None else levels.masked_fill(free, 0)
            curvature = ((self.hessian[columns, columns] @ u) * u).sum(dim=0)
            slope = ((self.hessian[columns] @ self.delta) * u).sum(dim=0)
            old = self.scale[group].clone()
            new = _fitted(old, slope, curvature)
            self.scale[group] = new
            self.delta[columns].addcmul_(u, new - old)
            if free is not None:
                self.levels[columns] = torch.where(free, levels * (old / new), levels)
        return self.errors()

    def _refit_rows(self) -> Tensor:
        """The same for one scale a row, by one product with H in place of three: H u follows from
        H d, since u s = d + W."""
        if self.moved_target is None:
            self.moved_target = self.hessian @ self.target
        moved = self.hessian @ self.delta
        old = self.scale[0].clone()
        curvature = ((moved + self.moved_target) * self.levels).sum(dim=0) / old
        slope = (moved * self.levels).sum(dim=0)
        errors = (moved * self.delta).sum(dim=0)
        new = _fitted(old, slope, curvature)
        step = new - old
        self.scale[0] = new
        self.delta.addcmul_(self.levels, step)
        return errors + (2 * slope + curvature * step) * step


def _fitted(old: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    new = old - slope / curvature
    # A row of zeros has no curvature, and a scale must not leave the range of a float.
    return torch.where((curvature > 0) & (new > 0.1 * old) & (new < 10 * old), new, old)
