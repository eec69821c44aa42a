# SPDX-License-Identifier: Apache-2.0
"""Outlier tokens, and the prefix that takes them out of the sequence (PrefixQuant, section 4).

For the input X [T, C] of a block's down_proj, M_t = max_c |X[t, c]| and token t is an outlier if
M_t > eta * median(M). A few such tokens ruin static scales. Put in front of every input, they stay
the only ones: the rest of the sequence has none.

Two ways to choose them:

- *paper*: o = ceil(max over blocks of the mean number of outlier tokens a sample), and the prefix
  is the o most frequent outlier tokens (position 0 not counted), then BOS.
- *verified* (the default): start from BOS alone and scan again with the prefix in place; add the
  most frequent outlier token while any remain. What remains at every step is reported.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prefixquant import ops
from prefixquant.decoder import FloatDecoder
from prefixquant.errors import UserError
from prefixquant.progress import SILENT, Progress
from prefixquant.quantizer import search_dtype
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations

_MOST_TOKENS = 8  # a verified prefix longer than this would mean that prefixing does not work here
_PERPLEXITY_SAMPLES = 16  # windows of the scan that the float perplexities are taken on


@dataclass
class ScanResult:
    """Outlier tokens of a float model on samples [n, T] with a prefix in place."""

    prefix: tuple[int, ...]
    samples: int
    max_ratio: list[float]  # per block, the largest M_t / median(M)
    outliers: list[int]  # per block, outlier tokens over all samples
    tokens: Counter = field(default_factory=Counter)  # outlier token -> count, position 0 apart
    initial: int = 0  # outliers at position 0, over blocks and samples
    perplexity: float = math.nan

    @property
    def remaining(self) -> int:
        return sum(self.outliers)

    def to_dict(self, tokenizer) -> dict[str, Any]:
        return {
            "prefix": list(self.prefix),
            "text": prefix_texts(tokenizer, self.prefix),
            "float_perplexity": self.perplexity,
            "outlier_tokens": self.remaining,
            "outliers_at_position_0": self.initial,
            "outliers_per_sample": max(self.outliers, default=0) / self.samples,
            "most_frequent": [
                {"token": token, "text": tokenizer.decode([token]), "count": count}
                for token, count in self.tokens.most_common(5)
            ],
            "max_ratio": self.max_ratio,
        }


@dataclass
class PrefixSearch:
    """The chosen prefix and the scans that led to it."""

    mode: str
    prefix: tuple[int, ...]
    bos: int
    bos_source: str
    steps: list[ScanResult]

    def to_dict(self, tokenizer) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "prefix": list(self.prefix),
            "text": prefix_texts(tokenizer, self.prefix),
            "bos": self.bos,
            "bos_source": self.bos_source,
            "steps": [step.to_dict(tokenizer) for step in self.steps],
        }


def prefix_texts(tokenizer, prefix: tuple[int, ...]) -> list[str]:
    return [tokenizer.decode([token]) for token in prefix]


def initial_token(model: nn.Module, tokenizer) -> tuple[int, str]:
    """The token that starts a sequence, and where it was found: BOS, or what a family without one
    (Qwen) uses in its place.

    Raises:
        UserError: the tokenizer and the model name no special token at all.
    """
    for holder, source in ((tokenizer, "tokenizer"), (model.config, "config")):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            if isinstance(value, list | tuple):
                value = value[0] if value else None
            if value is not None:
                return int(value), f"{name} of the {source}"
    raise UserError(
        "prefix: the model has no BOS, EOS or pad token; give one with --prefix text:..."
    )


class OutlierScanner:
    """Scans one float model, unrotated, on one set of samples."""

    def __init__(self, model: nn.Module, samples: Tensor, eta: float, progress: Progress = SILENT):
        device = next(model.parameters()).device
        plan = plan_rotations(model_geometry(model.config), rotate=False)
        self.decoder = FloatDecoder(model, plan, dtype=search_dtype(device), device=device)
        self.samples = samples
        self.eta = eta
        self.progress = progress
        self._head = self.decoder.head_weight()

    def scan(self, prefix: tuple[int, ...]) -> ScanResult:
        """One pass over all samples and blocks, with ``prefix`` in front."""
        count, length = self.samples.shape
        result = ScanResult(prefix, count, [], [])
        flat = self.samples.flatten()
        current = {"max_ratio": 0.0, "outliers": 0, "row": 0}

        def tap(name: str, inner: Tensor) -> None:
            if name != "mlp":
                return
            for sample in inner:  # [T, C]: the median is one sample's
                row_max, median, mask = outlier_scan(sample, self.eta)
                ratio = (row_max.max() / median.clamp_min(1e-30)).item()
                current["max_ratio"] = max(current["max_ratio"], ratio)
                for position in mask.nonzero().flatten().tolist():
                    current["outliers"] += 1
                    if position == 0:
                        result.initial += 1
                    else:
                        result.tokens[flat[current["row"] * length + position].item()] += 1
                current["row"] += 1

        text = f"scan with {len(prefix)} prefix tokens"
        with self.progress.stage(text, total=len(self.decoder)) as advance:
            kv = self.decoder.prefix(prefix)
            for _, x in self.decoder.run(self.samples, kv, tap=tap):
                stream = x
                result.max_ratio.append(current["max_ratio"])
                result.outliers.append(current["outliers"])
                current.update(max_ratio=0.0, outliers=0, row=0)
                advance()
        result.perplexity = self._perplexity(stream)
        return result

    def _perplexity(self, x: Tensor) -> float:
        total, count = 0.0, 0
        for part, ids in zip(x[:_PERPLEXITY_SAMPLES].split(1), self.samples.split(1), strict=False):
            losses = self.decoder.token_losses(part, ids, self._head)
            total += losses.sum().item()
            count += losses.numel()
        return math.exp(total / count)


def outlier_scan(x: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(M [T], median(M) [], M > eta * median(M) [T]) of x [T, C], on any device."""
    if x.device.type == "cpu":
        return ops.outlier_scan(x, eta)
    row_max = x.abs().amax(dim=-1).float()
    median = row_max.median()
    return row_max, median, row_max > eta * median


def paper_prefix(unprefixed: ScanResult, bos: int) -> tuple[int, ...]:
    """The paper's rule on a scan without prefix."""
    size = math.ceil(max(unprefixed.outliers, default=0) / unprefixed.samples)
    return (*(token for token, _ in unprefixed.tokens.most_common(size)), bos)


def search_prefix(
    model: nn.Module,
    tokenizer,
    samples: Tensor,
    *,
    mode: str = "verified",
    eta: float = 64.0,
    progress: Progress = SILENT,
) -> PrefixSearch:
    """Chooses the prefix by ``mode``: verified, paper, bos, none, or ``text:...``.

    Every scan is kept as a step, with the float perplexity measured under that prefix; verified and
    paper mode measure no prefix, BOS alone and the paper's prefix as well as the chosen one.
    """
    bos, source = initial_token(model, tokenizer)
    scanner = OutlierScanner(model, samples, eta, progress)
    if mode in ("none", "bos") or mode.startswith("text:"):
        prefix = _given_prefix(mode, tokenizer, bos)
        return PrefixSearch(mode, prefix, bos, source, [scanner.scan(prefix)])

    steps = {(): scanner.scan(()), (bos,): scanner.scan((bos,))}
    by_paper = paper_prefix(steps[()], bos)
    if by_paper not in steps:
        steps[by_paper] = scanner.scan(by_paper)
    chosen = by_paper
    if mode == "verified":
        chosen = (bos,)
        while steps[chosen].tokens and len(chosen) < _MOST_TOKENS:
            token = steps[chosen].tokens.most_common(1)[0][0]
            longer = (token, *chosen)
            if longer not in steps:
                steps[longer] = scanner.scan(longer)
            if steps[longer].remaining >= steps[chosen].remaining:
                break  # the token did not take its outliers with it: more of them will not either
            chosen = longer
    return PrefixSearch(mode, chosen, bos, source, list(steps.values()))


def _given_prefix(mode: str, tokenizer, bos: int) -> tuple[int, ...]:
    if mode == "none":
        return ()
    if mode == "bos":
        return (bos,)
    text = mode.removeprefix("text:")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"prefix: expected text after 'text:', got {mode!r}")
    return tuple(ids)


def scan(
    model: nn.Module, tokenizer, samples: Tensor, eta: float = 64.0, progress: Progress = SILENT
) -> dict[str, Any]:
    """The verified search as a report, without quantizing anything."""
    search = search_prefix(model, tokenizer, samples, eta=eta, progress=progress)
    return {"eta": eta, "samples": list(samples.shape), **search.to_dict(tokenizer)}
