# SPDX-License-Identifier: Apache-2.0
"""The decode step as CUDA graphs: one launch a token, whatever the number of kernels in it."""

import torch
from torch import Tensor

from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.decoder import Decoder, Step
from prefixquant.runtime.sampling import argmax

# Places of a captured step: a batch runs in the next one up.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
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
