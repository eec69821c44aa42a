# SPDX-License-Identifier: Apache-2.0
"""What 4-bit scales cost at each activation point of the float model, static and dynamic."""

import torch
from accuracy.workbench import Workbench
from prefixquant.calibrate import search_activation_scale
from prefixquant.config import RecipeConfig, Scheme
from prefixquant.counted import Counted
from prefixquant.decoder_setup import make_decoder
from prefixquant.observe import SAMPLES, observe_blocks
from prefixquant.quantizer import fake_quantize, fake_quantize_dynamic
from prefixquant.roles import POINTS, model_geometry
from prefixquant.rotate import plan_rotations
from prefixquant.text import sample_windows
from torch import Tensor

_BITS = 4
_WINDOWS = 4  # of 1024 tokens, other ones than balance and centre are measured on


class PointErrors:
    """Errors of one recipe: point -> figures, means over the blocks.

    - ``static``, ``dynamic``: ``|(Q(x) - x) W^T|^2 / |x W^T|^2`` in percent, W the float weights
      that read the point, with the scale (or clip) that is searched for it; ``static, companded``
      and ``dynamic, companded``: the same with companded levels;
    - ``spread``: the standard deviation of the tokens' norms over their mean.
    """

    @torch.no_grad()
    def __init__(self, bench: Workbench, *, r5: bool, r6: bool):
        recipe = RecipeConfig(scheme=Scheme.parse("w4a4kv4"), r5_block_size=0 if r5 else 1, r6=r6)
        samples = sample_windows(
            bench.calibration(), SAMPLES + _WINDOWS, recipe.search_seqlen, recipe.seed
        )
        plan = plan_rotations(model_geometry(bench.model.config), **recipe.rotation_options)
        prefix = bench.search.prefix
        decoder = make_decoder(bench.model, plan, samples, prefix, recipe, bench.device)
        rest = samples[SAMPLES:]
        counted = Counted(rest.shape, len(prefix), recipe.eta, decoder.device)
        rows: dict[str, list[dict[str, float]]] = {point: [] for point in POINTS}
        for block, batches in observe_blocks(decoder, rest, prefix, counted):
            seen: dict[str, list[Tensor]] = {point: [] for point in POINTS}
            for tensors, mask in batches:
                for point in POINTS:
                    seen[point].append(tensors[point][mask])
            for point, roles in POINTS.items():
                weights = [block.weights[role] for role in roles]
                rows[point].append(_figures(torch.cat(seen[point]), weights))
        self.figures = {
            point: {key: sum(f[key] for f in found) / len(found) for key in found[0]}
            for point, found in rows.items()
        }


def _figures(x: Tensor, weights: list[Tensor]) -> dict[str, float]:
    readers = torch.cat(weights)
    size = (x @ readers.T).square().sum()
    errors = {}
    for companded in (False, True):
        for mode, quantizer in (("static", fake_quantize), ("dynamic", fake_quantize_dynamic)):
            scale = search_activation_scale(x, weights, _BITS, mode, companded)
            delta = quantizer(x, scale, _BITS, companded) - x
            name = f"{mode}, companded" if companded else mode
            errors[name] = (100 * (delta @ readers.T).square().sum() / size).item()
    norms = x.norm(dim=-1)
    return {**errors, "spread": (norms.std() / norms.mean()).item()}
