# SPDX-License-Identifier: Apache-2.0
"""The decoder that a recipe asks for: rotated, and as its samples say balanced and centred."""

import torch
from torch import Tensor, nn

from prefixquant.balance_measure import measure_balance
from prefixquant.centre_measure import measure_centre
from prefixquant.config import RecipeConfig
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.observe import SAMPLES
from prefixquant.rotate import RotationPlan, plan_rotations


@torch.no_grad()
def make_decoder(
    model: nn.Module,
    plan: RotationPlan,
    samples: Tensor,
    prefix: tuple[int, ...],
    recipe: RecipeConfig,
    device: torch.device | str = "cpu",
) -> FloatDecoder:
    """The decoder of ``plan``; as the recipe says balanced (where R4 is there to make it matter)
    and then centred on the first samples, with the prefix in place.

    Args:
        samples: int64 [n, T]; tokens that stand out by the recipe's eta do not count (`Counted`).
    """
    samples = samples[:SAMPLES]

    def measured(measure, decoder: FloatDecoder, **options) -> list:
        counted = Counted(samples.shape, len(prefix), recipe.eta, decoder.device)
        return measure(decoder, samples, prefix, counted, **options)

    scales = means = None
    if recipe.balance and plan.rotations.r4:
        plain = FloatDecoder(model, plan_rotations(plan.geometry, rotate=False), device=device)
        scales = measured(
            measure_balance,
            plain,
            norms=plan.rotations.r6,
            centred=recipe.centred,
            keys=recipe.centred_keys,
        )
    if recipe.centred:
        uncentred = FloatDecoder(model, plan, device=device, balance=scales)
        means = measured(measure_centre, uncentred, keys=recipe.centred_keys)
    return FloatDecoder(model, plan, device=device, balance=scales, centre=means)
