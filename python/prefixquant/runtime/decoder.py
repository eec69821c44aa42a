# SPDX-License-Identifier: Apache-2.0
"""The decoder: how tokens become logits, on the fused operations of `prefixquant.ops`.

A step works on flat tokens: T tokens of one or more sequences side by side, [T, C], without
padding. Nine operations a block (`Decoder._blocks`)::

    rmsnorm_quantize          hidden -> int8
    gemm_fused                q, k, v as one product
    rope_kv_append            RoPE and R3; k and v quantized into the cache
    kv_decode_attention       over [prefix | cache], quantized for the next product
    gemm_fused                o projection + residual
    rmsnorm_quantize          hidden -> int8
    gemm_fused                gate and up as one product
    swiglu_hadamard_quantize  R4 (silu(gate) * up) -> int8
    gemm_fused                down projection + residual

The prefix of the checkpoint is 16-bit keys and values in front of every sequence, at positions -P
to -1: tokens keep positions 0, 1, .. and the prefix takes no room in the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import ops
from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.weights import Block, Weights

# Tokens that go through the blocks at a time: it bounds the memory of a prefill (the widest tensor
# of Llama-3-8B is then 470 MB), and fewer would not fill a GPU.
_CHUNK_TOKENS = 8192

Attend = Callable[[int, Block, Tensor], Tensor]  # (layer, block, q [T, Hq, D]) -> int8 [T, Hq * D]


@dataclass(frozen=True)
class Step:
    """One new token of each of B sequences.

    The sequence in place b of these tensors owns page b of the cache.
    """

    tokens: Tensor  # int64 [B]
    positions: Tensor  # int32 [B]
    slots: Tensor  # int64 [B]: where its key and value go; -1 for a place that is not used
    lengths: Tensor  # int32 [B]: rows of the cache it attends, its own included

    @classmethod
    def after(cls, lengths: list[int], places: int, cache: StaticCache) -> "Step":
        """The step behind cached sequences of these lengths, padded to ``places``."""
        device, unused = cache.keys[0].device, places - len(lengths)
        slots = [cache.slots(b, length, 1)[0] for b, length in enumerate(lengths)]
        return cls(
            torch.zeros(places, dtype=torch.int64, device=device),
            torch.tensor(lengths + [0] * unused, dtype=torch.int32, device=device),
            torch.tensor(slots + [-1] * unused, dtype=torch.int64, device=device),
            torch.tensor([n + 1 for n in lengths] + [0] * unused, dtype=torch.int32, device=device),
        )

    def advance(self) -> None:
        """To the next token of every sequence, in place."""
        used = self.slots >= 0
        self.positions.add_(used)
        self.slots.add_(used)
        self.lengths.add_(used)


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one prompt."""

    sequence: int
    start: int
    tokens: list[int]
    is_last: bool  # of its prompt


def split_prompts(prompts: list[list[int]], chunk: int) -> Iterator[list[Segment]]:
    """The prompts as chunks of at most ``chunk`` tokens, each of one or more segments."""
    segments: list[Segment] = []
    room = chunk
    for sequence, prompt in enumerate(prompts):
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


class Decoder:
    """The blocks of `Weights`, with tables of RoPE for the positions that were reserved."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.scaling = weights.geometry.head_dim**-0.5
        self.cos = self.sin = torch.empty(0)

    def reserve_positions(self, count: int) -> None:
        """Makes positions 0 .. count - 1 usable."""
        if len(self.cos) < count:
            self.cos, self.sin = rope_tables(self.weights.config, count, self.weights.device)

    # ---- prompts ----

    def prefill(self, prompts: list[list[int]], cache: StaticCache) -> Tensor:
        """Puts the prompts into the cache, from row 0 on.

        Returns:
            float32 [B, V], the logits behind the last token of each.
        """
        geometry = self.weights.geometry
        last = torch.empty(
            len(prompts), geometry.hidden, dtype=self.weights.dtype, device=self.weights.device
        )
        for segments in split_prompts(prompts, _CHUNK_TOKENS):
            hidden = self._prefill_chunk(segments, cache)
            end = 0
            for segment in segments:
                end += len(segment.tokens)
                if segment.is_last:
                    last[segment.sequence] = hidden[end - 1]
        return self.logits(last)

    def _prefill_chunk(self, segments: list[Segment], cache: StaticCache) -> Tensor:
        device, weights = self.weights.device, self.weights
        tokens = torch.tensor([t for s in segments for t in s.tokens], device=device)
        positions = torch.cat(
            [torch.arange(s.start, s.start + len(s.tokens), device=device) for s in segments]
        )
        slots = torch.cat(
            [
                torch.arange(rows.start, rows.stop, device=device)
                for rows in (cache.slots(s.sequence, s.start, len(s.tokens)) for s in segments)
            ]
        )

        def attend(layer: int, block: Block, q: Tensor) -> Tensor:
            pieces = [
                ops.kv_prefill_attention(
                    piece,
                    cache.keys[layer],
                    cache.values[layer],
                    block.k_scale,
                    block.v_scale,
                    block.prefix_key,
                    block.prefix_value,
                    weights.kv_bits,
                    segment.start,
                    self.scaling,
                    segment.sequence,
                )
                for segment, piece in zip(
                    segments, q.split([len(s.tokens) for s in segments]), strict=True
                )
            ]
            out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return ops.quantize_static(out, block.o.input_scale, block.o.bits[1])

        return self._blocks(self.embed(tokens), positions.int(), slots, cache, attend)

    # ---- one token of each sequence ----

    def decode(self, step: Step, cache: StaticCache, max_length: int) -> Tensor:
        """float32 [B, V], the logits behind the tokens of the step.

        Nothing is read back from the device, so that a CUDA graph can hold it.

        Args:
            max_length: a bound of ``step.lengths``.
        """
        weights = self.weights

        def attend(layer: int, block: Block, q: Tensor) -> Tensor:
            return ops.kv_decode_attention(
                q,
                cache.keys[layer],
                cache.values[layer],
                block.k_scale,
                block.v_scale,
                block.prefix_key,
                block.prefix_value,
                step.lengths,
                None,
                weights.kv_bits,
                max_length,
                self.scaling,
                block.o.input_scale,
                block.o.bits[1],
            )

        hidden = self.embed(step.tokens)
        return self.logits(self._blocks(hidden, step.positions, step.slots, cache, attend))

    # ---- both ----

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weights.embedding).to(self.weights.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        weights = self.weights
        return weights.head(ops.rmsnorm(hidden, weights.final_norm, weights.geometry.eps))

    def _blocks(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: StaticCache,
        attend: Attend,
    ) -> Tensor:
        """hidden [T, C] through all blocks; appends to the cache."""
        weights, r3, r4 = self.weights, self.weights.rotation, self.weights.mlp_rotation
        for layer, block in enumerate(weights.blocks):
            q = ops.rope_kv_append(
                block.qkv(block.input_norm(hidden)),
                self.cos,
                self.sin,
                positions,
                block.q_norm,
                block.k_norm,
                weights.geometry.eps,
                r3.signs,
                r3.size,
                block.k_scale,
                block.v_scale,
                weights.kv_bits,
                cache.keys[layer],
                cache.values[layer],
                slots,
                weights.geometry.heads,
            )
            hidden = block.o(attend(layer, block, q), residual=hidden)
            gate, up = block.gate_up(block.post_norm(hidden)).chunk(2, dim=-1)
            inner = ops.swiglu_hadamard_quantize(
                gate, up, r4.signs, r4.size, block.down.input_scale, block.down.bits[1]
            )
            hidden = block.down(inner, residual=hidden)
        return hidden


def rope_tables(config, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [count, D], of the RoPE that transformers gives this configuration."""
    import copy

    from transformers import AutoModel

    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    if getattr(one_layer, "layer_types", None):
        one_layer.layer_types = one_layer.layer_types[:1]
    with torch.device("meta"):  # only its RoPE is wanted, of the right class
        rotary_class = type(AutoModel.from_config(one_layer).rotary_emb)
    rotary = rotary_class(config).to(device)
    probe = torch.zeros(1, dtype=torch.float32, device=device)  # gives the dtype
    cos, sin = rotary(probe, torch.arange(count, device=device)[None])
    return cos[0].contiguous(), sin[0].contiguous()
