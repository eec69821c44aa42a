# SPDX-License-Identifier: Apache-2.0
"""Block-AP: each block's weights and scales trained to give the float block's output.

EfficientQAT (arXiv 2407.11062), section 3.1, as PrefixQuant (arXiv 2410.05265), section 5.3, uses
it: the loss is the mean squared error of the block's output on the stream of the quantized blocks
before it, against the float stream; weights, weight scales, activation scales and K/V scales are
trained together.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from prefixquant.block import PrefixKV, block_forward
from prefixquant.calibrate import CalibratedBlock
from prefixquant.config import FinetuneConfig
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.finetune.activations import ActivationStore, batches, choose_place
from prefixquant.finetune.learned import Learned, LearnedBlock
from prefixquant.finetune.training import Schedule, Stepper, Task, train, training_mode
from prefixquant.roles import BlockWeights

# A captured step holds about this many times a block's float32 weights: latents, gradients, two
# moments, fake-quantized copies (Llama-3-70B's block: 30 GiB for 3.2 GiB). Over this share of the
# device's memory it is given back after every block, for the next block's calibration.
_STEP_COPIES, _KEPT_SHARE = 9, 0.25


class BlockTuner:
    """Holds the training samples' streams, and tunes block after block on them.

    Args:
        decoder: gives embedding, RoPE and shapes.
        samples: int64 [n, T]; the last ``config.validation_samples`` of them are held out.
        counted: the tokens whose errors the loss adds up.
        quantized: False where only the float stream is wanted (no block is tuned).
    """

    def __init__(
        self,
        decoder: FloatDecoder,
        samples: Tensor,
        counted: Counted,
        config: FinetuneConfig,
        seed: int,
        *,
        quantized: bool = True,
    ):
        self.config, self.seed = config, seed
        self.shape, self.device = decoder.shape, decoder.device
        self.counted = counted
        self.rope = decoder.rope(samples.shape[1])
        self.trained = len(samples) - config.validation_samples
        shape = (*samples.shape, decoder.geometry.hidden)
        place = choose_place(config.activations, 8 * samples.numel() * shape[2], self.device)
        self.floating = ActivationStore(shape, self.device, place, folder=config.folder)
        self.quantized = (
            ActivationStore(shape, self.device, place, folder=config.folder) if quantized else None
        )
        for rows in batches(0, len(samples)):
            embedded = decoder.embed(samples[rows])
            for store in self._stores():
                store.write(rows, embedded)
        self._learned: LearnedBlock | None = None
        self._stepper: Stepper | None = None
        self._x: Tensor | None = None
        self._target: Tensor | None = None
        self._weight: Tensor | None = None

    def _stores(self) -> list[ActivationStore]:
        return [store for store in (self.floating, self.quantized) if store is not None]

    def advance_float(self, block: BlockWeights, prefix: PrefixKV) -> None:
        """Takes the float stream through the float block."""
        self.floating.advance(
            lambda rows, x: block_forward(
                block, self.shape, x, self.rope, prefix, tap=self.counted.tap(rows)
            )
        )

    def advance_quantized(self, block: CalibratedBlock, prefix: PrefixKV) -> None:
        """Takes the quantized stream through the finished block."""
        self.quantized.advance(
            lambda rows, x: block_forward(
                block.simulated, self.shape, x, self.rope, prefix, block.scales
            )
        )

    def tune(
        self,
        index: int,
        original: BlockWeights,
        block: CalibratedBlock,
        prefix: PrefixKV,
        on_epoch: Callable[[], None] = lambda: None,
    ) -> tuple[CalibratedBlock, dict[str, Tensor], dict]:
        """Trains one block from ``block`` on; the float stream must be past it, the quantized one
        before it.

        Returns:
            The tuned block, the floating weights behind its integers (role -> [N, K]), and what
            happened for the report.
        """
        start = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        fresh = LearnedBlock(block, original, prefix, Learned(weights=True))
        with training_mode(self.device):
            self._prepare(fresh)
            generator = torch.Generator().manual_seed(_block_seed(self.seed, index))
            learned = self._learned
            task = Task(self._load, self._validate, learned.snapshot, learned.restore)
            log = train(self._stepper, self._schedule(), generator, task, on_epoch)
        tuned, _ = self._learned.freeze()
        latents = self._learned.floating_weights()
        report = log.to_dict() | {"seconds": time.monotonic() - start}
        if self.device.type == "cuda":
            report["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            if self._step_bytes() > _KEPT_SHARE * torch.cuda.mem_get_info(self.device)[1]:
                self.release()
        return tuned, latents, report

    def release(self) -> None:
        """Gives back what a training step holds on the device; the next block makes it anew."""
        self._learned = self._stepper = self._x = self._target = self._weight = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step_bytes(self) -> int:
        """About what the captured step holds of the device."""
        return _STEP_COPIES * sum(4 * p.numel() for p in self._learned.parameters())

    def _schedule(self) -> Schedule:
        return Schedule(
            self.config.epochs,
            self.trained,
            self._x.shape[0],
            self.config.patience,
            self.floating.values.device,
        )

    def _prepare(self, fresh: LearnedBlock) -> None:
        """Puts a block's values where the (captured) step reads them."""
        if self._learned is None:
            batch = min(self.config.batch, self.trained)
            self._x = torch.zeros(batch, *self.floating.values.shape[1:], device=self.device)
            self._target = torch.zeros_like(self._x)
            self._weight = torch.ones(*self._x.shape[:2], device=self.device)
            self._learned = fresh
            kept = fresh.snapshot()
            groups = fresh.parameter_groups(self.config.weight_rate, self.config.scale_rate)
            self._stepper = Stepper(groups, self._loss, self.device, self.config.graphs)
            fresh.restore(kept)
        else:
            self._learned.copy_from(fresh)
        self._stepper.reset()

    def _load(self, rows: Tensor) -> None:
        self._x.copy_(self.quantized.read(rows))
        self._target.copy_(self.floating.read(rows))
        self._weight.copy_(self.counted.mask[rows.to(self.device)])

    def _error(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The mean squared error of the tokens whose weight [B, T] is 1 and not 0."""
        block, scales, prefix = self._learned.materialize()
        out = block_forward(block, self.shape, x, self.rope, prefix, scales)
        errors = (out - target).float().square().mean(-1)
        return (errors * weight).sum() / weight.sum()

    def _loss(self) -> Tensor:
        return self._error(self._x, self._target, self._weight)

    @torch.no_grad()
    def _validate(self) -> float:
        total = torch.zeros((), device=self.device)
        for rows in batches(self.trained, len(self.floating)):
            x = self.quantized.read(rows)
            weight = self.counted.mask[rows].float()
            total += self._error(x, self.floating.read(rows), weight) * len(x)
        return total.item() / self.config.validation_samples


def _block_seed(seed: int, index: int) -> int:
    """Each block draws its own order, so a run that resumes at it draws the same."""
    return seed * 1_000_003 + index
