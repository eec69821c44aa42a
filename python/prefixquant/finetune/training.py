# SPDX-License-Identifier: Apache-2.0
"""What both phases of fine-tuning share: precision, the optimizer step, the best of validation."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from prefixquant.quantizer import matmul_dtype

LEAST_RATE = 0.1  # the cosine schedule ends at this part of the rate
# Adam's first steps move every weight by the full rate, in the direction of one batch.
_WARMUP = 0.05  # part of the steps over which the rate rises
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_EAGER_STEPS = 3  # eager steps before a CUDA graph is captured: they allocate what it needs


# All but cuDNN's attention, whose backward pass adds in no fixed order.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextlib.contextmanager
def training_mode(device: torch.device) -> Iterator[None]:
    """bfloat16 products where the device has them, TF32 for the rest, and the same bits each time.

    Determinism matters more than the few percent it costs: a run that was killed and resumed has to
    end at the same integers.
    """
    low = matmul_dtype(device) is torch.bfloat16
    with (
        deterministic(),
        sdpa_kernel(_ATTENTION),
        torch.enable_grad(),
        # cache_enabled=False: every weight is used once a step, a cache would only keep copies.
        torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False),
    ):
        yield


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same bits each time, on the same device."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    workspace = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")  # torch refuses to be deterministic without
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        if workspace is None:
            del os.environ[_CUBLAS]


class Stepper:
    """AdamW on a loss that reads fixed buffers; on a CUDA device one step is one graph.

    A block has hundreds of small operations: launched one by one they take three times as long as
    they run. The graph is captured on the values at hand, so the caller sets parameters and buffers
    afterwards and calls `reset`.

    Args:
        groups: parameter groups with their ``lr``.
        loss: computes the scalar loss.
        device: where all of it lives.
        graph: capture the step; needs a CUDA device.
    """

    def __init__(
        self, groups: list[dict], loss: Callable[[], Tensor], device: torch.device, graph: bool
    ):
        on_gpu = device.type == "cuda"
        self.rates = [group["lr"] for group in groups]
        self.loss = loss
        self.total = torch.zeros((), device=device)  # sum of the losses since it was last read
        self.optimizer = torch.optim.AdamW(
            [
                {**g, "lr": torch.tensor(g["lr"], device=device) if on_gpu else g["lr"]}
                for g in groups
            ],
            weight_decay=0.0,
            capturable=on_gpu,
            fused=on_gpu or None,
        )
        self.graph = self._capture() if graph and on_gpu else None

    def _eager(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_EAGER_STEPS):
                self._eager()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager()
        return graph

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        if self.graph is None:
            self._eager()
        else:
            self.graph.replay()

    def reset(self) -> None:
        """Forgets the moments and the number of steps, in place."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.total.zero_()


class RunningMean:
    """The exponential mean of what `stepper` trains: ``m = decay m + (1 - decay) p`` after a step.

    A weight that lies between two levels is moved from one to the other by the noise of single
    batches; its mean says where it belongs (stochastic weight averaging, arXiv 1803.05407).
    """

    def __init__(self, stepper: Stepper, decay: float):
        self.parameters = [p for g in stepper.optimizer.param_groups for p in g["params"]]
        self.values = [p.detach().clone() for p in self.parameters]
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        self._update(self.values, self.parameters, 1)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold their means; afterwards they are what they were."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.clone()  # a captured graph knows both by their addresses
            parameter.copy_(value)
            value.copy_(kept)


def rate_factor(step: int, steps: int) -> float:
    """A linear rise, and half a cosine from 1 to `LEAST_RATE`."""
    rising = min(1.0, (step + 1) / max(1.0, _WARMUP * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rising * (LEAST_RATE + (1 - LEAST_RATE) * cosine)


@dataclass
class TrainingLog:
    """Losses of one training: of validation before it and after every epoch, of training."""

    validation: list[float]
    training: list[float] = field(default_factory=list)
    best_epoch: int = 0  # 0: the start was never improved on

    def to_dict(self) -> dict:
        return {
            "validation_loss": self.validation,
            "training_loss": self.training,
            "best_epoch": self.best_epoch,
        }


@dataclass(frozen=True)
class Schedule:
    """``epochs`` passes over ``samples``; ends after ``patience`` epochs without gain."""

    epochs: int
    samples: int
    batch: int
    patience: int
    index_device: torch.device  # where the samples are indexed

    @property
    def batches(self) -> int:
        """A last smaller batch is left out: shapes stay the same for the graph."""
        return max(1, self.samples // self.batch)


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    load: Callable[[Tensor], None]  # the samples of an index tensor, to where the loss reads them
    validate: Callable[[], float]  # the mean loss on samples held out
    snapshot: Callable[[], object]
    restore: Callable[[object], None]
    begin_epoch: Callable[[int], None] = lambda epoch: None  # may replace the samples


def train(
    stepper: Stepper,
    schedule: Schedule,
    generator: torch.Generator,
    task: Task,
    on_epoch: Callable[[], None] = lambda: None,
    mean: RunningMean | None = None,
) -> TrainingLog:
    """Trains and leaves the parameters that validated best, the start included.

    Args:
        generator: draws the order of samples.
        on_epoch: called at the end of every epoch.
        mean: validated and kept in place of the parameters.
    """
    log = TrainingLog([task.validate()])
    best, kept = log.validation[0], task.snapshot()
    steps = schedule.epochs * schedule.batches
    for epoch in range(schedule.epochs):
        task.begin_epoch(epoch)
        order = torch.randperm(schedule.samples, generator=generator).to(schedule.index_device)
        for index in range(schedule.batches):
            task.load(order[index * schedule.batch : (index + 1) * schedule.batch])
            stepper.step(rate_factor(epoch * schedule.batches + index, steps))
            if mean is not None:
                mean.update()
        log.training.append(stepper.total.item() / schedule.batches)
        stepper.total.zero_()
        with contextlib.nullcontext() if mean is None else mean.in_place():
            log.validation.append(task.validate())
            if log.validation[-1] < best:
                best, kept, log.best_epoch = log.validation[-1], task.snapshot(), epoch + 1
        on_epoch()
        if epoch + 1 - log.best_epoch >= schedule.patience:
            break
    task.restore(kept)
    return log
