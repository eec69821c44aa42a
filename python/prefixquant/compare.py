# SPDX-License-Identifier: Apache-2.0
"""Several models on the same windows: perplexity, KL divergence and top-1 agreement with one.

All are read window by window, so the reference is computed once and no logits are kept. On T tokens
of a window there are T - 1 predictions; a prefix is extra and not counted.

    KL     = mean over predictions of sum_v p(v) (log p(v) - log q(v)),  p the reference
    top-1  = share of predictions whose likeliest token is the reference's
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixquant.progress import SILENT, Progress

# Rows of logits worked on at once: [256, 49152] in float32 are 50 MB.
_ROWS = 256


@dataclass(frozen=True)
class Candidate:
    """A model, and the tokens to put in front of every window (those of a checkpoint are hidden in
    it: it needs none)."""

    model: Any
    prefix_ids: tuple[int, ...] = ()

    @torch.inference_mode()
    def logits(self, window: Tensor) -> Tensor:
        """int64 [T] -> [T, V], the prefix cut off again."""
        ids = torch.cat([torch.tensor(self.prefix_ids, dtype=torch.int64), window])
        output = self.model(input_ids=ids[None].to(self.model.device), use_cache=False)
        return output.logits[0, len(self.prefix_ids) :]


def compare(
    candidates: Mapping[str, Candidate],
    reference: str,
    samples: Tensor,
    progress: Progress = SILENT,
) -> dict[str, dict[str, float]]:
    """Measures every candidate on the windows [n, T].

    Returns:
        name -> ``ppl``, ``nll`` (mean, natural log), ``kl`` and ``top1`` against
        ``candidates[reference]``, and ``tokens`` (predictions measured).
    """
    sums = {name: {"nll": 0.0, "kl": 0.0, "top1": 0.0} for name in candidates}
    others = [name for name in candidates if name != reference]
    tokens = 0
    with progress.stage("evaluate", total=len(samples) * len(candidates)) as advance:
        for window in samples:
            targets = window[1:]
            logits = candidates[reference].logits(window)[:-1]
            expected = logits.float().log_softmax(-1)  # log p [T - 1, V]
            _add(sums[reference], logits, expected, targets)
            advance()
            for name in others:
                _add(sums[name], candidates[name].logits(window)[:-1], expected, targets)
                advance()
            tokens += len(targets)
    return {
        name: {
            "ppl": math.exp(total["nll"] / tokens),
            **{key: value / tokens for key, value in total.items()},
            "tokens": tokens,
        }
        for name, total in sums.items()
    }


def _add(total: dict[str, float], logits: Tensor, expected: Tensor, targets: Tensor) -> None:
    """Adds the window's sums of NLL, KL and agreement."""
    targets = targets.to(expected.device)
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        p = expected[rows]
        q = logits[rows].to(p.device).float().log_softmax(-1)
        total["nll"] -= q.gather(-1, targets[rows, None]).sum(dtype=torch.float64).item()
        total["kl"] += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        total["top1"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
