# SPDX-License-Identifier: Apache-2.0
"""How prompts go through the blocks: in chunks of flat tokens, each of one or more segments."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixquant.runtime.cache import StaticCache


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one prompt."""

    sequence: int
    start: int
    tokens: list[int]
    is_last: bool  # of its prompt


def split_prompts(prompts: list[list[int]], chunk: int) -> Iterator[list[Segment]]:
    """The prompts as chunks of at most ``chunk`` tokens, each of one or more segments.

    A prompt that fits into a chunk is not split: attention from its first token on is the quickest.
    """
    segments: list[Segment] = []
    room = chunk
    for sequence, prompt in enumerate(prompts):
        if len(prompt) > room and segments:
            yield segments
            segments, room = [], chunk
        start = 0
        while start < len(prompt):
            tokens = prompt[start : start + room]
            end = start + len(tokens)
            segments.append(Segment(sequence, start, tokens, end == len(prompt)))
            start, room = end, room - len(tokens)
            if room == 0:
                yield segments
                segments, room = [], chunk
    if segments:
        yield segments


@dataclass(frozen=True)
class Chunk:
    """Segments that go through the blocks together: T tokens of neighbouring sequences."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int32 [T]
    slots: Tensor  # int64 [T]
    sequence: int  # the first one; the others follow
    starts: list[int]  # of each sequence, the position of its first token here
    counts: list[int]  # and its tokens
    # Of the E prompts whose last token is here; None: no prompt ends here.
    ends: Tensor | None  # int64 [E]: the rows of these tokens
    lengths: Tensor | None  # int32 [E]
    ended_pages: Tensor | None  # int32 [E, 1]

    @classmethod
    def of(cls, segments: list[Segment], cache: StaticCache) -> "Chunk":
        device = cache.keys[0].device
        tokens = torch.tensor([t for s in segments for t in s.tokens])
        rows = [range(s.start, s.start + len(s.tokens)) for s in segments]
        positions = torch.cat([torch.arange(r.start, r.stop) for r in rows])
        rows = [cache.slots(s.sequence, s.start, len(s.tokens)) for s in segments]
        slots = torch.cat([torch.arange(r.start, r.stop) for r in rows])
        tokens, positions, slots = torch.stack((tokens, positions, slots)).to(device)
        numbers = [s.start for s in segments], [len(s.tokens) for s in segments]
        all_of = (tokens, positions.int(), slots, segments[0].sequence, *numbers)
        ends = itertools.accumulate(len(s.tokens) for s in segments)
        numbers = [
            (end - 1, s.start + len(s.tokens), s.sequence)
            for s, end in zip(segments, ends, strict=True)
            if s.is_last
        ]
        if not numbers:
            return cls(*all_of, None, None, None)
        ends, lengths, pages = torch.tensor(numbers).T.contiguous().to(device)
        return cls(*all_of, ends, lengths.int(), pages.int()[:, None])
