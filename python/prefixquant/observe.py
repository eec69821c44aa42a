# SPDX-License-Identifier: Apache-2.0
"""The float model's activations on samples, block by block, for what is measured on them."""

from collections.abc import Iterator

from torch import Tensor

from prefixquant.block import PrefixKV, block_forward
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.roles import BlockWeights

SAMPLES = 8  # of those that calibration searches on: 8192 tokens give a channel's mean and size


def observe_blocks(
    decoder: FloatDecoder,
    samples: Tensor,
    prefix: tuple[int, ...],
    counted: Counted,
    *,
    batch: int = 2,
) -> Iterator[tuple[BlockWeights, Iterator[tuple[dict[str, Tensor], Tensor]]]]:
    """Every block with an iterator over the batches of samples that go through it.

    A batch is what the points of `prefixquant.block.Tap` saw, and the mask [b, T] of its tokens
    that count. The iterator must be used up before the next block is asked for.

    Args:
        samples: int64 [n, T].
        prefix: its tokens; they go through every block in front of the samples.
    """
    x, rope = decoder.embed(samples), decoder.rope(samples.shape[1])
    prefix_of = decoder.prefix_stream(prefix)

    def batches(block: BlockWeights, kv: PrefixKV) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(samples), batch):
            rows = slice(start, start + batch)
            look, seen = counted.tap(rows), {}

            def tap(name: str, value: Tensor, look=look, seen=seen) -> None:
                look(name, value)
                seen[name] = value

            x[rows] = block_forward(block, decoder.shape, x[rows], rope, kv, tap=tap)
            yield seen, counted.mask[rows]

    for index in range(len(decoder)):
        block = decoder.block(index)
        yield block, batches(block, prefix_of(block))
