# SPDX-License-Identifier: Apache-2.0
"""End-to-end training of the quantized model against the float model's logits.

E2E-QP (EfficientQAT, arXiv 2407.11062, section 3.2) freezes the integers and trains scales; here
the loss is the KL divergence from the float model, so that no labels are needed and the model's
behaviour is what is kept. With ``weights`` the weights are trained too, straight through the
rounding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefixquant.block import PrefixKV, block_forward
from prefixquant.config import FinetuneConfig
from prefixquant.decoder import FloatDecoder
from prefixquant.finetune.activations import ActivationStore, batches
from prefixquant.finetune.learned import LearnedBlock
from prefixquant.finetune.training import (
    RunningMean,
    Schedule,
    Stepper,
    Task,
    train,
    training_mode,
)
from prefixquant.roles import BlockWeights

_LOGIT_ROWS = 2048  # rows of logits at once: [2048, 128256] in float32 are 1 GB


class DistillationLoss(torch.autograd.Function):
    """Mean over rows of ``KL(softmax(t W^T) || softmax(h W^T))``, logits made in slices.

    Forward keeps only the gradient of h, ``(softmax(h W^T) - softmax(t W^T)) W / rows``: the logits
    of a training batch would be the largest tensors by far.

    Args (of `apply`):
        hidden: h float32 [M, C], normed; teacher: t float32 [M, C]; head: W float32 [V, C].
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), _LOGIT_ROWS):
                rows = slice(start, start + _LOGIT_ROWS)
                expected = (teacher[rows] @ head.T).log_softmax(-1)
                found = (hidden[rows] @ head.T).log_softmax(-1)
                p = expected.exp()
                total += (p * expected.sub_(found)).sum()
                if grad is not None:
                    grad[rows] = found.exp_().sub_(p) @ head
        if grad is not None:
            ctx.save_for_backward(grad.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, outer: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * outer, None, None


def normed(x: Tensor, eps: float) -> Tensor:
    """The final norm, whose weight is folded into the head: float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@dataclass
class Teacher:
    """What the float model says of the training samples, and of others."""

    hidden: ActivationStore  # its residual stream after the last block
    head: Tensor  # float32 [V, C], the final norm folded in
    decoder: FloatDecoder  # gives the same stream
    prefix: list[PrefixKV]  # in every block of that decoder

    @classmethod
    def of(
        cls, hidden: ActivationStore, decoder: FloatDecoder, prefix: tuple[int, ...]
    ) -> "Teacher":
        """That of a decoder's model behind the tokens of a prefix."""
        head = decoder.head_weight().to(decoder.device, torch.float32)
        plain = decoder.stream_only()
        return cls(hidden, head, plain, plain.prefix(prefix))


class EndToEnd:
    """All blocks at once, on the same device.

    Args:
        blocks: what is trained; left with the values that validated best.
        samples: int64 [n, T], those of the teacher.
        generated: int64 [m, T], samples that take the place of half of the text's, in turn; None:
            train on the text alone.
    """

    def __init__(
        self,
        decoder: FloatDecoder,
        blocks: list[LearnedBlock],
        samples: Tensor,
        teacher: Teacher,
        config: FinetuneConfig,
        seed: int,
        generated: Tensor | None = None,
    ):
        self.samples, self.generated = samples, generated
        self.shape, self.device, self.eps = decoder.shape, decoder.device, decoder.geometry.eps
        self.blocks, self.teacher, self.config, self.seed = blocks, teacher, config, seed
        self.counted = slice(1 if blocks[0].key_start.shape[1] else 0, None)
        self.rope = decoder.rope(samples.shape[1])
        self.embedded = ActivationStore(
            tuple(teacher.hidden.values.shape),
            self.device,
            teacher.hidden.place,
            folder=config.folder,
        )
        for rows in batches(0, len(samples)):
            self.embedded.write(rows, decoder.embed(samples[rows]))
        self.trained = len(samples) - config.validation_samples

    def run(self, on_epoch: Callable[[], None] = lambda: None) -> dict:
        """Trains; returns what happened for the report."""
        start = time.monotonic()
        config = self.config
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        batch = min(config.batch, self.trained)
        self._x = torch.zeros(batch, *self.embedded.values.shape[1:], device=self.device)
        self._target = torch.zeros_like(self._x)
        schedule = Schedule(
            config.e2e_epochs,
            self.trained,
            batch,
            config.patience,
            self.embedded.values.device,
        )
        with training_mode(self.device):
            kept = self._snapshot()
            stepper = Stepper(self._groups(), self._loss, self.device, config.graphs)
            self._restore(kept)
            stepper.reset()
            generator = torch.Generator().manual_seed(self.seed)
            task = Task(self._load, self._validate, self._snapshot, self._restore)
            if self._mixes:
                task = replace(task, begin_epoch=partial(self._mix, generator))
            mean = RunningMean(stepper, config.e2e_average) if config.e2e_average else None
            log = train(stepper, schedule, generator, task, on_epoch, mean)
            if self._mixes:
                self._place(self.samples[: self.trained])
        report = log.to_dict() | {"seconds": time.monotonic() - start}
        if self.device.type == "cuda":
            report["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return report

    @property
    def _mixes(self) -> bool:
        return self.config.e2e_mix or self.generated is not None

    def _mix(self, generator: torch.Generator, epoch: int) -> None:
        """The training samples strung together in another order and cut at another place: the same
        tokens in other contexts, of which the float model says other things. Generated samples
        take the place of the second half, the next ones in every epoch."""
        samples = self.samples[: self.trained]
        samples = samples[torch.randperm(len(samples), generator=generator)]
        if self.generated is not None:
            half = len(samples) // 2
            turn = torch.arange(epoch * half, (epoch + 1) * half) % len(self.generated)
            samples[len(samples) - half :] = self.generated[turn].to(samples.device)
            samples = samples[torch.randperm(len(samples), generator=generator)]
        start = int(torch.randint(samples.shape[1], (), generator=generator))
        self._place(samples.flatten().roll(-start).view_as(samples))

    @torch.no_grad()
    def _place(self, samples: Tensor) -> None:
        """Makes these the training samples: their embeddings and the teacher's stream."""
        teacher = self.teacher
        with torch.autocast(self.device.type, enabled=False):
            for rows in batches(0, len(samples)):
                x = teacher.decoder.embed(samples[rows])
                self.embedded.write(rows, x)
                teacher.hidden.write(rows, x)
            for index in range(len(self.blocks)):
                block, prefix = teacher.decoder.block(index), teacher.prefix[index]
                teacher.hidden.advance(
                    partial(self._float_forward, block, prefix), last=len(samples)
                )

    def _float_forward(
        self, block: BlockWeights, prefix: PrefixKV, rows: slice, x: Tensor
    ) -> Tensor:
        return block_forward(block, self.teacher.decoder.shape, x, self.rope, prefix)

    def _groups(self) -> list[dict]:
        """The groups of all blocks, those of one rate together."""
        merged: dict[float, dict] = {}
        config = self.config
        rates = config.e2e_weight_rate, config.e2e_scale_rate, config.e2e_prefix_rate
        for block in self.blocks:
            for group in block.parameter_groups(*rates):
                merged.setdefault(group["lr"], {"params": [], "lr": group["lr"]})
                merged[group["lr"]]["params"] += group["params"]
        return list(merged.values())

    def _snapshot(self) -> list[list[Tensor]]:
        return [block.snapshot() for block in self.blocks]

    def _restore(self, kept: list[list[Tensor]]) -> None:
        for block, values in zip(self.blocks, kept, strict=True):
            block.restore(values)

    def _load(self, rows: Tensor) -> None:
        self._x.copy_(self.embedded.read(rows))
        self._target.copy_(self.teacher.hidden.read(rows))

    def _through(self, learned: LearnedBlock, x: Tensor) -> Tensor:
        block, scales, prefix = learned.materialize()
        return block_forward(block, self.shape, x, self.rope, prefix, scales)

    def _divergence(self, x: Tensor, target: Tensor) -> Tensor:
        for learned in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    self._through, learned, x, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._through(learned, x)
        hidden, target = (normed(t[:, self.counted], self.eps).flatten(0, 1) for t in (x, target))
        return DistillationLoss.apply(hidden, target, self.teacher.head)

    def _loss(self) -> Tensor:
        return self._divergence(self._x, self._target)

    @torch.no_grad()
    def _validate(self) -> float:
        total = 0.0
        for rows in batches(self.trained, len(self.embedded)):
            x = self.embedded.read(rows)
            total += self._divergence(x, self.teacher.hidden.read(rows)).item() * len(x)
        return total / self.config.validation_samples
