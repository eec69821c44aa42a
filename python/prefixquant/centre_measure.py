# SPDX-License-Identifier: Apache-2.0
"""The means of a model's activations (`prefixquant.centre`), measured on samples."""

from torch import Tensor

from prefixquant.centre import BlockCentre
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.observe import observe_blocks
from prefixquant.roles import Geometry

_POINTS = ("qkv", "o", "gate_up")


def measure_centre(
    decoder: FloatDecoder, samples: Tensor, prefix: tuple[int, ...], counted: Counted
) -> list[BlockCentre]:
    """The means of every block on samples, with the prefix in place.

    Args:
        decoder: not centred.
        samples: int64 [n, T].
        prefix: its tokens.
        counted: the tokens that count.
    """
    found = []
    for _, batches in observe_blocks(decoder, samples, prefix, counted):
        sums: dict[str, Tensor | float] = dict.fromkeys(_POINTS, 0.0)
        tokens = 0
        for seen, mask in batches:
            for name in _POINTS:
                sums[name] = sums[name] + seen[name][mask].double().sum(0)
            tokens += int(mask.sum())
        means = {name: total / max(1, tokens) for name, total in sums.items()}
        found.append(_block_centre(means, decoder.geometry))
    return found


def _block_centre(means: dict[str, Tensor], geometry: Geometry) -> BlockCentre:
    heads = means["o"].view(geometry.kv_heads, -1, geometry.head_dim)
    vectors = {"qkv": means["qkv"], "gate_up": means["gate_up"], "value": heads.mean(1)}
    # Both 16-bit dtypes hold these values: what is stored is what the biases are made of.
    return BlockCentre(**{name: t.bfloat16().float() for name, t in vectors.items()})
