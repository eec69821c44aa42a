# SPDX-License-Identifier: Apache-2.0
"""What happens to each block on its way into a checkpoint: calibrate, fine-tune, remember."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefixquant.block import BlockScales, PrefixKV, block_forward, no_tap
from prefixquant.calibrate import CalibratedBlock, Streams, calibrate_block
from prefixquant.config import FinetuneConfig, RecipeConfig
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.finetune import (
    BlockTuner,
    EndToEnd,
    Learned,
    LearnedBlock,
    Teacher,
    generate_samples,
)
from prefixquant.resume import BlockState, SavedBlock
from prefixquant.roles import BlockWeights
from prefixquant.solvers import WeightSolver
from prefixquant.text import sample_windows

_SEARCH_BATCH = 2  # as in calibration: the same products give the same bits


@dataclass
class FinishedBlock:
    """A block as it goes into the checkpoint."""

    block: CalibratedBlock
    prefix: PrefixKV
    report: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The windows of the calibration text that blocks are made on: int64 [n, T]."""

    search: Tensor
    training: Tensor | None  # where fine-tuning is asked for

    @classmethod
    def draw(cls, recipe: RecipeConfig, calibration: Tensor) -> "Samples":
        """
        Raises:
            UserError: too little text.
        """
        tuning = recipe.finetune
        return cls(
            sample_windows(calibration, recipe.search_samples, recipe.search_seqlen, recipe.seed),
            sample_windows(
                calibration, tuning.samples, tuning.seqlen, recipe.seed, what="training text"
            )
            if tuning.active
            else None,
        )


class BlockPipeline:
    """Takes blocks through calibration and fine-tuning, in order.

    Args:
        prefix_ids: the tokens of the prefix.
        state: where finished blocks are kept; blocks found there are not made again.
    """

    def __init__(
        self,
        decoder: FloatDecoder,
        recipe: RecipeConfig,
        prefix_ids: tuple[int, ...],
        samples: Samples,
        state: BlockState | None = None,
    ):
        self.decoder, self.recipe, self.state = decoder, recipe, state
        self.prefix_ids = prefix_ids
        self.prefix = prefix = decoder.prefix(prefix_ids)
        self._solver = WeightSolver(recipe.solver, recipe.group_size, recipe.outlier_fraction)
        embedded = decoder.embed(samples.search)
        counted = Counted(samples.search.shape, prefix[0].length, recipe.eta, decoder.device)
        self.streams = Streams(embedded, embedded.clone(), counted)
        self.rope = decoder.rope(recipe.search_seqlen)
        self.training = samples.training
        self.tuner: BlockTuner | None = None
        if recipe.finetune.active:
            self.tuner = BlockTuner(
                decoder,
                samples.training,
                Counted(samples.training.shape, prefix[0].length, recipe.eta, decoder.device),
                recipe.finetune,
                recipe.seed,
                quantized=recipe.finetune.epochs > 0,
            )
        self._generated: Tensor | None = None
        # Where training end to end starts: finished blocks, the floating weights behind them.
        self._starts: list[tuple[CalibratedBlock, dict[str, Tensor]]] = []

    @property
    def steps_per_block(self) -> int:
        """How often `run` calls its ``advance`` for a block."""
        return 1 + self.recipe.finetune.epochs

    @property
    def end_to_end_epochs(self) -> int:
        return self.recipe.finetune.e2e_epochs

    def run(self, index: int, advance: Callable[[int], None]) -> FinishedBlock:
        """Makes one block, or takes it from the state, and moves all streams past it."""
        original = self.decoder.block(index)
        if self.tuner is not None:
            self.tuner.advance_float(original, self.prefix[index])
        saved = None if self.state is None else self.state.load(index, self.decoder.device)
        if saved is None:
            block, saved = self._make(index, original, advance)
            if self.state is not None:
                self.state.save(index, saved)
        else:
            block = saved.rebuild(original)
            self._advance(self.streams.floating, original, None, index, self.streams.counted)
            self._advance(self.streams.quantized, block.simulated, block.scales, index)
            advance(self.steps_per_block)
        if self.tuner is not None and self.tuner.quantized is not None:
            self.tuner.advance_quantized(block, self.prefix[index])
        block.targets = {}
        if self.end_to_end_epochs:
            self._starts.append((_without_floats(block), saved.latents))
        return FinishedBlock(block, self.prefix[index], saved.report)

    def _make(
        self, index: int, original: BlockWeights, advance: Callable[[int], None]
    ) -> tuple[CalibratedBlock, SavedBlock]:
        tuning = self.recipe.finetune.epochs > 0
        entering = self.streams.quantized.clone()
        block = calibrate_block(
            original,
            self.decoder.shape,
            self.recipe.scheme,
            self.rope,
            self.prefix[index],
            self.streams,
            self._solver,
            self.recipe.compensation,
        )
        advance(1)
        latents = block.targets
        report: dict[str, Any] = {}
        if tuning:
            epochs = 0

            def on_epoch() -> None:
                nonlocal epochs
                epochs += 1
                advance(1)

            report["calibrated_error"] = block.relative_error
            start = dataclasses.replace(original, weights=block.targets)
            block, latents, report["fine_tuning"] = self.tuner.tune(
                index, start, block, self.prefix[index], on_epoch
            )
            advance(self.recipe.finetune.epochs - epochs)
        # As for a block from the state, so that both go on with the same bits.
        self.streams.quantized.copy_(entering)
        self._advance(self.streams.quantized, block.simulated, block.scales, index)
        block.relative_error = _relative_error(self.streams)
        if not (self.end_to_end_epochs and self.recipe.finetune.e2e_weights):
            latents = {}
        report = block_report(index, block) | report
        biases = {role: b for role, b in block.simulated.biases.items() if b is not None}
        return block, SavedBlock(block.weights, block.scales, biases, report, latents)

    def _advance(
        self,
        stream: Tensor,
        block: BlockWeights,
        scales: BlockScales | None,
        index: int,
        counted: Counted | None = None,
    ) -> None:
        for start in range(0, len(stream), _SEARCH_BATCH):
            rows = slice(start, start + _SEARCH_BATCH)
            tap = no_tap if counted is None else counted.tap(rows)
            stream[rows] = block_forward(
                block,
                self.decoder.shape,
                stream[rows],
                self.rope,
                self.prefix[index],
                scales,
                tap,
            )

    def generate_samples(self, advance: Callable[[int], None]) -> None:
        """Has the float model write what training end to end takes beside the text; ``advance`` is
        called with the number of samples that came to be."""
        tuning = self.recipe.finetune
        self._generated = generate_samples(
            self.decoder.model,
            self.training[: tuning.samples - tuning.validation_samples],
            self.prefix_ids,
            tuning.e2e_generated,
            self.recipe.seed,
            advance,
        )

    def end_to_end(
        self, advance: Callable[[int], None], config: FinetuneConfig | None = None
    ) -> tuple[list[FinishedBlock], dict]:
        """Trains all blocks together, when the last one has been run.

        Args:
            config: other settings than the recipe's, for a comparison.

        Returns:
            The blocks as they are afterwards, and what happened for the report.
        """
        start = time.monotonic()
        self.tuner.release()
        config = config or self.recipe.finetune
        learned = Learned(config.e2e_weights, config.e2e_norms, config.e2e_prefix)
        blocks = [
            LearnedBlock(block, dataclasses.replace(block.simulated, weights=latents), kv, learned)
            for (block, latents), kv in zip(self._starts, self.prefix, strict=True)
        ]
        teacher = Teacher.of(self.tuner.floating, self.decoder, self.prefix_ids)
        training = EndToEnd(
            self.decoder,
            blocks,
            self.training,
            teacher,
            config,
            self.recipe.seed,
            self._generated,
        )
        report = training.run(lambda: advance(1))
        finished = []
        for index, each in enumerate(blocks):
            block, prefix = each.freeze()
            finished.append(FinishedBlock(block, prefix, block_report(index, block)))
        return finished, report | {"seconds": time.monotonic() - start}


def _without_floats(block: CalibratedBlock) -> CalibratedBlock:
    """The block without its dequantized weights: all blocks of a model wait side by side."""
    return dataclasses.replace(block, simulated=dataclasses.replace(block.simulated, weights={}))


def _relative_error(streams: Streams) -> float:
    error = (streams.quantized - streams.floating).square().sum()
    return (error / streams.floating.square().sum()).item()


def block_report(index: int, block: CalibratedBlock) -> dict[str, Any]:
    scales = block.scales
    report = {"block": index, "relative_error": block.relative_error}
    report["weight_errors"] = block.weight_errors
    report |= {f"{point}_scale": scale.item() for point, scale in scales.activations.items()}
    for name in ("k", "v"):
        scale = getattr(scales, name)
        if scale is not None:
            report[f"{name}_scale"] = scale.tolist()
    return report
