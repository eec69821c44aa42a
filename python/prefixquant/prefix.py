# SPDX-License-Identifier: Apache-2.0
"""Outlier tokens, and the prefix that takes them out of the sequence (PrefixQuant, section 4).

For the input X [T, C] of a block's down_proj, M_t = max_c |X[t, c]| and token t is an outlier if
M_t > eta * median(M). A few such tokens ruin static scales. Put in front of every input, they stay
the only ones: the rest of the sequence has none. The token at position 0 is tallied apart: it is an
outlier in every sequence without prefix, whatever it is.

Two ways to choose the prefix:

- *paper*: o = ceil(max over blocks of the mean number of outlier tokens a sample), and the prefix
  is the o most frequent outlier tokens (position 0 not counted), then BOS. X is taken before R4.
- *verified* (the default): start from BOS alone and scan again with the prefix in place; add the
  most frequent outlier token (position 0 not counted) while any remain. X is taken after R4, as it
  is quantized: R4 spreads what one channel of an ordinary token holds, but not an outlier token.

What remains at every step is reported, before and after R4.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prefixquant import ops
from prefixquant.decoder import FloatDecoder, compute_device
from prefixquant.errors import UserError
from prefixquant.progress import SILENT, Progress
from prefixquant.quantizer import matmul_dtype
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations, rotate_last_dim

_MOST_TOKENS = 8  # a verified prefix longer than this would mean that prefixing does not work here
_PROFILE_TOKENS = 512  # token maxima kept of the first sample, for the report
_PERPLEXITY_SAMPLES = 16  # windows of the scan that the float perplexities are taken on


@dataclass
class Tally:
    """Outlier tokens at one tensor of every block, over all samples."""

    max_ratio: list[float] = field(default_factory=list)  # per block, the largest M_t / median(M)
    outliers: list[int] = field(default_factory=list)  # per block, position 0 included
    tokens: Counter = field(default_factory=Counter)  # token -> count, position 0 apart
    at_position_0: int = 0
    inner_ratio: list[float] = field(default_factory=list)  # max_ratio, position 0 apart
    largest: list[float] = field(default_factory=list)  # per block, the largest M_t of all samples
    median: list[float] = field(default_factory=list)  # per block, the largest median of a sample
    smallest: list[float] = field(default_factory=list)  # per block, the smallest M_t
    profile: list[list[float]] = field(default_factory=list)  # per block, M_t of the first sample

    def add_block(self) -> None:
        self.max_ratio.append(0.0)
        self.inner_ratio.append(0.0)
        self.largest.append(0.0)
        self.median.append(0.0)
        self.smallest.append(math.inf)
        self.profile.append([])
        self.outliers.append(0)

    def add_sample(self, x: Tensor, ids: Tensor, eta: float) -> None:
        """x [T, C] of the newest block, ids [T]. The median is taken within the sample."""
        row_max, median, is_outlier = outlier_scan(x, eta)
        ratios = row_max / median.clamp_min(1e-30)
        self.max_ratio[-1] = max(self.max_ratio[-1], ratios.max().item())
        if len(ratios) > 1:
            self.inner_ratio[-1] = max(self.inner_ratio[-1], ratios[1:].max().item())
        self.largest[-1] = max(self.largest[-1], row_max.max().item())
        self.median[-1] = max(self.median[-1], median.item())
        self.smallest[-1] = min(self.smallest[-1], row_max.min().item())
        if not self.profile[-1]:  # five digits draw the same picture, and keep the report small
            self.profile[-1] = [float(f"{m:.5g}") for m in row_max[:_PROFILE_TOKENS].tolist()]
        for position in is_outlier.nonzero().flatten().tolist():
            self.outliers[-1] += 1
            if position == 0:
                self.at_position_0 += 1
            else:
                self.tokens[ids[position].item()] += 1

    def to_dict(self, tokenizer) -> dict[str, Any]:
        return {
            "max_ratio": self.max_ratio,
            "inner_ratio": self.inner_ratio,
            "largest": self.largest,
            "median": self.median,
            "smallest": self.smallest,
            "outliers": self.outliers,
            "outlier_tokens": self.tokens.total(),
            "outliers_at_position_0": self.at_position_0,
            "most_frequent": [
                {"token": token, "text": tokenizer.decode([token]), "count": count}
                for token, count in self.tokens.most_common(5)
            ],
        }


@dataclass
class ScanResult:
    """Outlier tokens of a float model on samples with a prefix in place."""

    prefix: tuple[int, ...]
    samples: int
    before_r4: Tally = field(default_factory=Tally)
    quantized: Tally = field(default_factory=Tally)  # the input of down_proj as it is quantized
    perplexity: float = math.nan

    def to_dict(self, tokenizer) -> dict[str, Any]:
        return {
            "prefix": list(self.prefix),
            "text": prefix_texts(tokenizer, self.prefix),
            "float_perplexity": self.perplexity,
            **self.quantized.to_dict(tokenizer),
            "before_r4": self.before_r4.to_dict(tokenizer),
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
            "profiles": self.profiles(),
        }

    def profiles(self) -> dict[str, Any]:
        """Token maxima M_t over one sample, at every step, in the block where the first step has
        its largest outlier."""
        first = self.steps[0].before_r4.max_ratio
        block = max(range(len(first)), key=first.__getitem__)
        return {
            "block": block,
            "steps": [
                {"before_r4": s.before_r4.profile[block], "quantized": s.quantized.profile[block]}
                for s in self.steps
            ],
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
    """Scans one float model, unrotated but for R4, on one set of samples [n, T]."""

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor,
        *,
        eta: float,
        r4_size: int = 1,
        progress: Progress = SILENT,
    ):
        device = compute_device(model)
        plan = plan_rotations(model_geometry(model.config), rotate=False)
        self.decoder = FloatDecoder(model, plan, dtype=matmul_dtype(device), device=device)
        self.samples = samples
        self.eta = eta
        self.r4_size = r4_size
        self.progress = progress
        self._head = self.decoder.head_weight().to(device)

    def scan(self, prefix: tuple[int, ...]) -> ScanResult:
        """One pass over all samples and blocks, with ``prefix`` in front."""
        result = ScanResult(prefix, len(self.samples))
        tallies = (result.before_r4, result.quantized)
        rows = iter(())

        def tap(name: str, inner: Tensor) -> None:
            if name != "mlp":
                return
            rotated = rotate_last_dim(inner, self.r4_size)
            for before, after, ids in zip(inner, rotated, rows, strict=False):
                result.before_r4.add_sample(before, ids, self.eta)
                result.quantized.add_sample(after, ids, self.eta)

        text = f"scan with {len(prefix)} prefix tokens"
        with self.progress.stage(text, total=len(self.decoder)) as advance:
            kv = self.decoder.prefix(prefix)
            for tally in tallies:
                tally.add_block()
            rows = iter(self.samples)
            for index, x in self.decoder.run(self.samples, kv, tap=tap):
                stream = x
                advance()
                if index + 1 < len(self.decoder):
                    for tally in tallies:
                        tally.add_block()
                    rows = iter(self.samples)
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
    found = unprefixed.before_r4
    size = math.ceil(max(found.outliers, default=0) / unprefixed.samples)
    return (*(token for token, _ in found.tokens.most_common(size)), bos)


def search_prefix(
    model: nn.Module,
    tokenizer,
    samples: Tensor,
    *,
    mode: str = "verified",
    eta: float = 64.0,
    r4_size: int = 1,
    progress: Progress = SILENT,
) -> PrefixSearch:
    """Chooses the prefix by ``mode``: verified, paper, bos, none, or ``text:...``.

    Every scan is kept as a step, with the float perplexity measured under that prefix; verified and
    paper mode measure no prefix, BOS alone and the paper's prefix as well as the chosen one.
    ``r4_size`` is the block size of R4, 1 for none.
    """
    bos, source = initial_token(model, tokenizer)
    scanner = OutlierScanner(model, samples, eta=eta, r4_size=r4_size, progress=progress)
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
        while steps[chosen].quantized.tokens and len(chosen) < _MOST_TOKENS:
            tokens = steps[chosen].quantized.tokens
            token = tokens.most_common(1)[0][0]
            longer = (token, *chosen)
            if longer not in steps:
                steps[longer] = scanner.scan(longer)
            if steps[longer].quantized.tokens.total() >= tokens.total():
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
    """The verified search as a report, without quantizing anything; R4 is the full transform."""
    search = search_prefix(
        model,
        tokenizer,
        samples,
        eta=eta,
        r4_size=model_geometry(model.config).intermediate,
        progress=progress,
    )
    return {"eta": eta, "samples": list(samples.shape), **search.to_dict(tokenizer)}
