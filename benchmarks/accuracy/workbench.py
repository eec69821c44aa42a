# SPDX-License-Identifier: Apache-2.0
"""Quantizes and measures one model many times over, without checkpoints: fake quantization only.

For experiments that compare settings. Everything is `prefixquant`'s own (blocks, calibration,
solvers) on one device; what the packed kernels give for a checkpoint is `run_protocol.py`'s.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from prefixquant import text as texts
from prefixquant.block import BlockScales, PrefixKV, block_forward
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import COMPENSATION, RecipeConfig, Scheme
from prefixquant.decoder import FloatDecoder
from prefixquant.decoder_setup import make_decoder
from prefixquant.loading import load_float_model
from prefixquant.prefix import PrefixSearch, search_prefix
from prefixquant.roles import BlockWeights, model_geometry
from prefixquant.rotate import plan_rotations
from prefixquant.solvers import WeightSolver
from prefixquant.text import sample_windows
from prefixquant.workflow import Protocol, calibration_tokens
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """What one measurement is made of; the defaults are the product's."""

    label: str
    scheme: str = "w4a4kv4"
    prefix: tuple[int, ...] | None = None  # None: the verified prefix
    rotate: bool = True
    balance: bool = RecipeConfig().balance
    centre: bool = RecipeConfig().centre
    r5: bool = True
    r6: bool = RecipeConfig().r6
    solver: str = RecipeConfig().solver
    compensation: float = COMPENSATION
    samples: int = RecipeConfig().search_samples
    seed: int = 0
    text: str | None = None  # calibration text; None: that of the workbench


@dataclass
class Simulated:
    """Dequantized blocks with their scales: a model that `Workbench.measure` can run."""

    decoder: FloatDecoder
    blocks: list[BlockWeights]
    scales: list[BlockScales | None]
    prefix: list[PrefixKV]


class Workbench:
    """One float model, its text, and the windows that everything is measured on.

    The reference of KL divergence and top-1 agreement is the float model behind the verified
    prefix.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.device = torch.device(arguments.device)
        self.model, self.tokenizer = load_float_model(arguments.model, torch.float32)
        self.model.to(self.device)
        content = texts.load_text(arguments.text)
        self.protocol = Protocol(
            Path(arguments.text).name, windows=arguments.windows, seqlen=arguments.seqlen
        )
        self.windows = self.protocol.samples(content, self.tokenizer).to(self.device)
        self._calibration = {None: calibration_tokens(content, self.tokenizer)}

    def calibration(self, text: str | None = None) -> Tensor:
        """The token stream that settings calibrate on."""
        if text not in self._calibration:
            tokens = calibration_tokens(texts.load_text(text), self.tokenizer)
            self._calibration[text] = tokens
        return self._calibration[text]

    @cached_property
    def search(self) -> PrefixSearch:
        """The verified prefix, found once on the text of the workbench."""
        return self.search_with()

    def search_with(self, **changes) -> PrefixSearch:
        recipe = RecipeConfig()
        samples = sample_windows(self.calibration(), recipe.nsamples, recipe.seqlen, recipe.seed)
        size = model_geometry(self.model.config).intermediate
        return search_prefix(self.model, self.tokenizer, samples, r4_size=size, **changes)

    def float_model(self, prefix: tuple[int, ...]) -> Simulated:
        plan = plan_rotations(model_geometry(self.model.config), rotate=False)
        decoder = FloatDecoder(self.model, plan, device=self.device)
        blocks = [decoder.block(index) for index in range(len(decoder))]
        return Simulated(decoder, blocks, [None] * len(blocks), decoder.prefix(prefix))

    @torch.no_grad()
    def quantize(self, setting: Setting) -> Simulated:
        ids = self.search.prefix if setting.prefix is None else setting.prefix
        length, scheme = RecipeConfig().search_seqlen, Scheme.parse(setting.scheme)
        samples = sample_windows(
            self.calibration(setting.text), setting.samples, length, setting.seed
        )
        geometry = model_geometry(self.model.config)
        recipe = RecipeConfig(
            scheme=scheme,
            rotate=setting.rotate,
            r5_block_size=0 if setting.r5 else 1,
            r6=setting.r6,
            balance=setting.balance,
            centre=setting.centre,
            seed=setting.seed,
        )
        plan = plan_rotations(geometry, **recipe.rotation_options)
        decoder = make_decoder(self.model, plan, samples, ids, recipe, self.device)
        prefix = decoder.prefix(ids)
        embedded = decoder.embed(samples)
        streams = Streams(embedded, embedded.clone())
        made = Simulated(decoder, [], [], prefix)
        for index in range(len(decoder)):
            calibrated = calibrate_block(
                decoder.block(index),
                decoder.shape,
                scheme,
                decoder.rope(length),
                prefix[index],
                streams,
                WeightSolver(setting.solver),
                setting.compensation,
            )
            made.blocks.append(calibrated.simulated)
            made.scales.append(calibrated.scales)
        return made

    @torch.no_grad()
    def hidden(self, model: Simulated) -> Tensor:
        """The final residual streams of all windows [n, T, C]."""
        rope = model.decoder.rope(self.windows.shape[1])
        parts = []
        for ids in self.windows.split(4):
            x = model.decoder.embed(ids)
            for each in zip(model.blocks, model.prefix, model.scales, strict=True):
                block, prefix, scales = each
                x = block_forward(block, model.decoder.shape, x, rope, prefix, scales)
            parts.append(x)
        return torch.cat(parts)

    @cached_property
    def reference(self) -> tuple[FloatDecoder, Tensor, Tensor]:
        """Decoder, head and final streams of the float model behind the verified prefix."""
        model = self.float_model(self.search.prefix)
        return model.decoder, model.decoder.head_weight(), self.hidden(model)

    @torch.no_grad()
    def by_window(self, model: Simulated) -> Tensor:
        """float64 [n, 3]: of every window the means of the negative log-likelihood, and against the
        reference of the KL divergence and the top-1 agreement."""
        decoder, head, expected_streams = self.reference
        own_head = model.decoder.head_weight()
        rows = []
        for ids, own, expected in zip(
            self.windows, self.hidden(model), expected_streams, strict=True
        ):
            log_q = model.decoder.logits(own[:-1], own_head).log_softmax(-1)
            log_p = decoder.logits(expected[:-1], head).log_softmax(-1)
            nll = -log_q.gather(1, ids[1:, None])
            kl = (log_p.exp() * (log_p - log_q)).double().sum(-1)
            agree = log_p.argmax(-1) == log_q.argmax(-1)
            rows.append(torch.stack([t.double().mean() for t in (nll, kl, agree)]))
        return torch.stack(rows).cpu()

    @staticmethod
    def over_windows(rows: Tensor) -> dict[str, float]:
        """``ppl``, ``kl`` and ``top1`` over all rows of `by_window`, as `prefixquant.compare`."""
        nll, kl, agree = rows.mean(0).tolist()
        return {"ppl": math.exp(nll), "kl": kl, "top1": agree}

    def measure(self, model: Simulated) -> dict[str, float]:
        return self.over_windows(self.by_window(model))

    def run(self, setting: Setting, patch: Callable | None = None) -> dict:
        """Quantizes and measures one setting. ``patch`` is a context manager factory that changes
        the method for the time of the quantization."""
        start = time.monotonic()
        if patch is None:
            model = self.quantize(setting)
        else:
            with patch():
                model = self.quantize(setting)
        seconds = time.monotonic() - start
        return {**self.measure(model), "seconds": round(seconds, 1)}

    def text_of(self, prefix: tuple[int, ...]) -> str:
        return " ".join(repr(self.tokenizer.decode([token])) for token in prefix) or "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a model folder or .gguf file")
    parser.add_argument("--text", required=True, help="a .txt or .jsonl file, also as .gz")
    parser.add_argument("--name", required=True, help="name of the model in the result file")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
