# SPDX-License-Identifier: Apache-2.0
"""The means of a model's activations (`prefixquant.centre`), measured on samples."""

from torch import Tensor

from prefixquant.block import apply_rope, head_projection
from prefixquant.centre import KEY_POSITIONS, BlockCentre
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.observe import observe_blocks
from prefixquant.roles import Geometry
from prefixquant.rotate import rotate_last_dim

_POINTS = ("qkv", "attended", "gate_up")


def measure_centre(
    decoder: FloatDecoder,
    samples: Tensor,
    prefix: tuple[int, ...],
    counted: Counted,
    *,
    keys: bool = False,
) -> list[BlockCentre]:
    """The means of every block on samples, with the prefix in place.

    Args:
        decoder: not centred.
        samples: int64 [n, T].
        prefix: its tokens.
        counted: the tokens that count.
        keys: whether the keys have one.
    """
    found = []
    rope = decoder.rope(key_positions(decoder)) if keys else None
    for block, batches in observe_blocks(decoder, samples, prefix, counted):
        sums: dict[str, Tensor | float] = dict.fromkeys((*_POINTS, "k"), 0.0)
        tokens = 0
        for seen, mask in batches:
            counting = {name: seen[name][mask] for name in _POINTS}
            if keys:
                counting["k"] = head_projection(block, decoder.shape, "k", counting["qkv"])
            for name, values in counting.items():
                sums[name] = sums[name] + values.double().sum(0)
            tokens += int(mask.sum())
        means = {name: total / max(1, tokens) for name, total in sums.items()}
        key = turned_mean(means["k"], rope, decoder.shape.r3_size) if keys else None
        found.append(_block_centre(means, key, decoder.geometry))
    return found


def key_positions(decoder: FloatDecoder) -> int:
    """How many positions the mean of the keys is an average over."""
    return min(KEY_POSITIONS, decoder.model.config.max_position_embeddings)


def turned_mean(mean: Tensor, rope: tuple[Tensor, Tensor], r3_size: int) -> Tensor:
    """R3 of a head's mean [H_kv, D] as RoPE turns it, on average over the positions of ``rope``."""
    turned = apply_rope(mean[:, None], *rope)  # [H_kv, positions, D]
    return rotate_last_dim(turned.mean(1).float(), r3_size)


def _block_centre(means: dict[str, Tensor], key: Tensor | None, geometry: Geometry) -> BlockCentre:
    heads = means["attended"].view(geometry.kv_heads, -1, geometry.head_dim)
    vectors = {"qkv": means["qkv"], "gate_up": means["gate_up"], "value": heads.mean(1)}
    # Both 16-bit dtypes hold these values: what is stored is what the biases are made of.
    return BlockCentre(**{name: t.bfloat16().float() for name, t in vectors.items()}, key=key)
