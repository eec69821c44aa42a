# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token from the logits, on their device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.errors import UserError

_ARGMAX_PARTS = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top-k, then top-p, as transformers does it.

    Args:
        temperature: 0 takes the likeliest token each time, and the rest is not looked at.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the fewest likeliest tokens whose probabilities sum to at least this; 1: all.
        seed: of the random choices; the same seed, prompts and device give the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if type(self.top_k) is not int or self.top_k < 0:
            raise UserError(f"top_k: expected an integer of at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next tokens, int64 [B], of float32 logits [B, V]."""
    if sampling.greedy:
        return argmax(logits)
    logits = filtered_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    # The Gumbel-max trick: argmax of log p + Gumbel noise is a draw from p, without a cumulative
    # sum and without reading anything back. -log of an exponential variable is Gumbel noise.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return argmax(logits - noise.log())


def argmax(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The place of the largest of each row [B, V], the first where several are; int64 [B].

    torch's own reads a row with few blocks of a GPU: 26 us for one of 128256 logits on an H100,
    a hundredth of a decode step. Here the parts of a row are searched side by side.
    """
    batch, vocab = logits.shape
    if not logits.is_cuda or vocab % _ARGMAX_PARTS:
        return torch.argmax(logits, dim=-1, out=out)
    return argmax_of_parts(logits.view(batch, _ARGMAX_PARTS, -1), out)


def argmax_of_parts(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """`argmax` of rows in parts [B, P, V / P]."""
    best, place = parts.max(dim=-1)
    part = best.argmax(dim=-1, keepdim=True)
    column = None if out is None else out[:, None]
    return torch.add(place.gather(1, part), part, alpha=parts.shape[-1], out=column)[:, 0]


def filtered_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf where a token is out of the running. Of equal logits, as 16-bit ones often are, those of
    the first tokens stay: with ``top_k`` 1 that is `argmax`."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        above, equal = logits > least, logits == least
        room = top_k - above.sum(-1, keepdim=True)
        logits = logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        # A token stays while those before it do not reach top_p: the likeliest always does.
        out = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits
