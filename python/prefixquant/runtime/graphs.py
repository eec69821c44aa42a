# SPDX-License-Identifier: Apache-2.0
"""Decode steps and short prompts as CUDA graphs: one launch, whatever the kernels in it."""

import torch
from torch import Tensor

from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.chunks import Chunk, Segment
from prefixquant.runtime.decoder import Decoder, Step
from prefixquant.runtime.sampling import argmax

# Places of a captured step: a batch runs in the next one up.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Tokens of a captured prefill: a prompt runs in the next one up. More keep the GPU busy for longer
# than their launches take.
_PROMPT_TOKENS = (64, 128, 256, 384, 512, 768, 1024)
_WARM_UP = 2  # kernels choose their configs and take their workspaces before the capture


def places_for(batch: int, device: torch.device) -> int:
    """How many places a step of ``batch`` sequences has on the device."""
    if device.type != "cuda":
        return batch
    return next((places for places in _BATCHES if places >= batch), batch)


class DecodeGraphs:
    """Greedy decode steps of a number of places on one cache, captured per bound of the lengths.

    A step of the graph computes ``logits`` from ``step``, puts their argmax into ``step.tokens``
    and advances the step. These buffers are the same for all its graphs.
    """

    def __init__(self, decoder: Decoder, cache: StaticCache, places: int):
        self.decoder = decoder
        self.cache = cache
        self.step = Step.after([], places, cache)
        vocab = decoder.weights.geometry.vocab
        self.logits = torch.zeros(places, vocab, device=decoder.weights.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def begin(self, step: Step) -> None:
        """Makes the next replay compute this step."""
        for own, other in zip(vars(self.step).values(), vars(step).values(), strict=True):
            own.copy_(other)

    def replay(self, max_length: int) -> Tensor:
        """One step; ``max_length`` bounds its lengths. Returns `logits`."""
        bound = length_bound(max_length, self.cache.capacity)
        if bound not in self._graphs:
            with torch.cuda.device(self.logits.device):
                self._graphs[bound] = self._capture(bound)
        self._graphs[bound].replay()
        return self.logits

    def _capture(self, bound: int) -> torch.cuda.CUDAGraph:
        saved = [t.clone() for t in vars(self.step).values()]
        self.step.slots.fill_(-1)  # the warm-up writes nothing to the cache
        self.step.used.zero_()
        stream = torch.cuda.Stream(self.decoder.weights.device)
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._run(bound)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                self._run(bound)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(vars(self.step).values(), saved, strict=True):
            tensor.copy_(value)
        return graph

    def _run(self, bound: int) -> None:
        self.decoder.decode(self.step, self.cache, bound, self.logits)
        argmax(self.logits, self.step.tokens)
        self.step.advance()


def length_bound(length: int, capacity: int) -> int:
    """The next power of two, at least 512: the attention chooses its grid by it."""
    return min(capacity, max(512, 1 << (length - 1).bit_length()))


class PromptGraphs:
    """Prefills of one prompt in page 0 of a cache, padded to one of `_PROMPT_TOKENS`.

    One by one, some 300 launches take longer than the work on a few hundred tokens. The padding is
    behind the prompt, where no token of it looks, and is not written to the cache. The first prompt
    of a size runs operation by operation, with the same result.
    """

    def __init__(self, decoder: Decoder, cache: StaticCache):
        self.decoder = decoder
        self.cache = cache
        self._chunks: dict[int, Chunk] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def logits(self, prompt: list[int]) -> Tensor | None:
        """float32 [1, V], those behind its last token; None: the prompt is too long."""
        fitting = (n for n in _PROMPT_TOKENS if len(prompt) <= n <= self.cache.capacity)
        size = next(fitting, None)
        if size is None:
            return None
        is_first = size not in self._chunks
        if is_first:
            self._chunks[size] = Chunk.of([Segment(0, 0, [0] * size, True)], self.cache)
        self._fill(self._chunks[size], prompt)
        if is_first:
            return self._run(size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def _fill(self, chunk: Chunk, prompt: list[int]) -> None:
        unused = chunk.tokens.numel() - len(prompt)
        slots = [*self.cache.slots(0, 0, len(prompt)), *[-1] * unused]
        chunk.tokens.copy_(torch.tensor(prompt + [0] * unused))
        chunk.slots.copy_(torch.tensor(slots))
        chunk.ends.fill_(len(prompt) - 1)
        chunk.lengths.fill_(len(prompt))

    def _run(self, size: int) -> Tensor:
        return self.decoder.logits(self.decoder.prefill_chunk(self._chunks[size], self.cache))

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        device = self.decoder.weights.device
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = self._run(size)
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph, logits
