# SPDX-License-Identifier: Apache-2.0
"""The decoder that a recipe asks for: rotated, and as its samples say balanced and centred."""

import torch
from torch import Tensor, nn

from prefixquant.balance_measure import measure_balance
from prefixquant.centre_measure import measure_centre
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
    *,
    balance: bool,
    centre: bool,
    centre_keys: bool,
    eta: float,
    device: torch.device | str = "cpu",
) -> FloatDecoder:
    """The decoder of ``plan``; balanced (where R4 is there to make it matter) and then centred on
    the first samples, with the prefix in place.

    Args:
        samples: int64 [n, T].
        centre_keys: whether centring takes the keys too.
        eta: of the outlier scan: tokens that stand out do not count (`Counted`).
    """
    samples = samples[:SAMPLES]

    def measured(measure, decoder: FloatDecoder, **options) -> list:
        counted = Counted(samples.shape, len(prefix), eta, decoder.device)
        return measure(decoder, samples, prefix, counted, **options)

    scales = means = None
    if balance and plan.rotations.r4:
        plain = FloatDecoder(model, plan_rotations(plan.geometry, rotate=False), device=device)
        scales = measured(measure_balance, plain)
    if centre:
        uncentred = FloatDecoder(model, plan, device=device, balance=scales)
        means = measured(measure_centre, uncentred, keys=centre_keys)
    return FloatDecoder(model, plan, device=device, balance=scales, centre=means)
