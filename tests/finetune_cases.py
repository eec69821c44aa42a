# SPDX-License-Identifier: Apache-2.0
"""What the tests of fine-tuning share: a tiny model with its first block calibrated."""

import torch
from prefixquant.calibrate import Streams, calibrate_block
from prefixquant.config import FinetuneConfig, RecipeConfig, Scheme
from prefixquant.counted import Counted
from prefixquant.decoder_setup import make_decoder
from prefixquant.finetune import BlockTuner, EndToEnd, Learned, LearnedBlock, Teacher
from prefixquant.roles import model_geometry
from prefixquant.rotate import plan_rotations
from tiny_families import tiny_family

CONFIG = FinetuneConfig(
    epochs=4,
    e2e_epochs=3,
    samples=20,
    seqlen=24,
    validation_samples=4,
    e2e_weight_rate=1e-4,
    e2e_scale_rate=5e-4,
)


class Setting:
    """A tiny model with its first block calibrated."""

    def __init__(self, family: str = "llama", scheme: str = "w4a4kv4", samples: int = 20):
        model = tiny_family(family)
        self.ids = torch.randint(0, 97, (samples, 24), generator=torch.Generator().manual_seed(5))
        self.scheme = Scheme.parse(scheme)
        recipe = RecipeConfig(scheme=self.scheme)
        plan = plan_rotations(model_geometry(model.config), **recipe.rotation_options)
        self.decoder = make_decoder(model, plan, self.ids, (3,), recipe)
        self.prefix = self.decoder.prefix((3,))
        start = self.decoder.embed(self.ids[:4])
        self.streams = Streams(start, start.clone())

    def counted(self, prefix_length: int) -> Counted:
        return Counted(self.ids.shape, prefix_length, 64.0, self.decoder.device)

    def calibrated(self, index: int):
        """(float block, calibrated block); the streams move past it."""
        original = self.decoder.block(index)
        with torch.no_grad():
            block = calibrate_block(
                original,
                self.decoder.shape,
                self.scheme,
                self.decoder.rope(24),
                self.prefix[index],
                self.streams,
            )
        return original, block

    def tuner(self, config: FinetuneConfig = CONFIG) -> BlockTuner:
        with torch.no_grad():
            return BlockTuner(self.decoder, self.ids, self.counted(1), config, seed=7)

    def end_to_end(
        self, config: FinetuneConfig, learned: Learned, generated: torch.Tensor | None = None
    ) -> tuple[EndToEnd, LearnedBlock]:
        """Training end to end of the first block alone, with what it trains."""
        tuner = self.tuner(config)
        original, block = self.calibrated(0)
        with torch.no_grad():
            tuner.advance_float(original, self.prefix[0])
        trained = LearnedBlock(block, original, self.prefix[0], learned)
        teacher = Teacher.of(tuner.floating, self.decoder, (3,))
        with torch.no_grad():
            training = EndToEnd(self.decoder, [trained], self.ids, teacher, config, 0, generated)
        return training, trained


def same_block(a, b) -> bool:
    scales = [(a.scales.k, b.scales.k), (a.scales.v, b.scales.v)]
    scales += [(s, b.scales.activations[p]) for p, s in a.scales.activations.items()]
    weights = [(w.q, b.weights[r].q) for r, w in a.weights.items()]
    weights += [(w.scale, b.weights[r].scale) for r, w in a.weights.items()]
    return all(torch.equal(x, y) for x, y in scales + weights if x is not None)
