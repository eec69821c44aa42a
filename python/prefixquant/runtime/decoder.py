# SPDX-License-Identifier: Apache-2.0
"""The decoder: how tokens become logits, on the fused operations of `prefixquant.ops`.

A step works on flat tokens: T tokens of one or more sequences side by side, [T, C], without
padding. Nine operations a block (`Decoder._queries` to `Decoder._behind_attention`), ten with R5::

    rmsnorm_quantize          hidden -> int8, or rmsnorm_hadamard_quantize: with R6
    gemm_fused                q, k, v as one product
    rope_kv_append            RoPE and R3; k and v quantized into the cache
    kv_decode_attention       over [prefix | cache], quantized for the next product, or
      hadamard_quantize       R5 of it -> int8
    gemm_fused                o projection + residual
    rmsnorm_quantize          hidden -> int8, or as above
    gemm_fused                gate and up as one product
    swiglu_hadamard_quantize  R4 (silu(gate) * up) -> int8
    gemm_fused                down projection + residual

The prefix of the checkpoint is 16-bit keys and values in front of every sequence, at positions -P
to -1: tokens keep positions 0, 1, .. and the prefix takes no room in the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import ops
from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.chunks import Chunk, split_prompts
from prefixquant.runtime.weights import Block, Weights

# Tokens that go through the blocks at a time: it bounds the memory of a prefill (the widest tensor
# of Llama-3-8B is then 470 MB), and fewer would not fill a GPU.
_CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class Step:
    """One new token of each of B sequences.

    The sequence in place b of these tensors owns page b of the cache.
    """

    tokens: Tensor  # int64 [B]
    counts: Tensor  # int32 [2, B]: `positions` and `lengths`
    slots: Tensor  # int64 [B]: where its key and value go; -1 for a place that is not used
    used: Tensor  # int32 [B]: 1, or 0 for a place that is not used

    @property
    def positions(self) -> Tensor:
        """int32 [B]"""
        return self.counts[0]

    @property
    def lengths(self) -> Tensor:
        """int32 [B]: rows of the cache that a token attends, its own included"""
        return self.counts[1]

    @classmethod
    def after(cls, lengths: list[int], places: int, cache: StaticCache) -> "Step":
        """The step behind cached sequences of these lengths, padded to ``places``."""
        device, unused = cache.keys[0].device, places - len(lengths)
        counts = [lengths + [0] * unused, [n + 1 for n in lengths] + [0] * unused]
        slots = [cache.slots(b, length, 1)[0] for b, length in enumerate(lengths)]
        used = [1] * len(lengths) + [0] * unused
        return cls(
            torch.zeros(places, dtype=torch.int64, device=device),
            torch.tensor(counts, dtype=torch.int32, device=device),
            torch.tensor(slots + [-1] * unused, dtype=torch.int64, device=device),
            torch.tensor(used, dtype=torch.int32, device=device),
        )

    def advance(self) -> None:
        """To the next token of every sequence, in place."""
        self.counts.add_(self.used)
        self.slots.add_(self.used)


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
        last = torch.empty(
            len(prompts),
            self.weights.geometry.hidden,
            dtype=self.weights.dtype,
            device=self.weights.device,
        )
        for segments in split_prompts(prompts, _CHUNK_TOKENS):
            chunk = Chunk.of(segments, cache)
            hidden = self.prefill_chunk(chunk, cache)
            if hidden is not None:
                last[chunk.ended_pages[:, 0]] = hidden
        return self.logits(last)

    def prefill_chunk(self, chunk: Chunk, cache: StaticCache) -> Tensor | None:
        """[prompts that end here, C], behind the last token of each; None: no prompt ends."""
        weights = self.weights
        hidden = self.embed(chunk.tokens)
        for layer, block in enumerate(weights.blocks):
            q = self._queries(layer, hidden, chunk.positions, chunk.slots, cache)
            if block is weights.blocks[-1]:
                # No key or value depends on what follows: only the last tokens go on.
                if chunk.ends is None:
                    return None
                hidden, q = hidden[chunk.ends], q[chunk.ends]
                attended = self._attend_cache(
                    layer, q, cache, chunk.lengths, cache.capacity, chunk.ended_pages
                )
            else:
                attended = self._attend_chunk(layer, q, cache, chunk)
            hidden = self._behind_attention(block, hidden, attended)
        return hidden

    def _attend_chunk(self, layer: int, q: Tensor, cache: StaticCache, chunk: Chunk) -> Tensor:
        """q [T, Hq, D] -> int8 [T, Hq * D]"""
        block = self.weights.blocks[layer]
        attended = ops.kv_prefill_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            block.k_scale,
            block.v_scale,
            block.prefix_key,
            block.prefix_value,
            self.weights.kv_bits,
            chunk.starts,
            self.scaling,
            chunk.sequence,
            counts=chunk.counts,
            output_scale=self._attended_scale(block),
            output_bits=block.o.bits[1],
        )
        return self._rotated(block, attended)

    # ---- one token of each sequence ----

    def decode(
        self, step: Step, cache: StaticCache, max_length: int, out: Tensor | None = None
    ) -> Tensor:
        """float32 [B, V], the logits behind the tokens of the step.

        Nothing is read back from the device, so that a CUDA graph can hold it.

        Args:
            max_length: a bound of ``step.lengths``.
            out: where the logits are written.
        """
        hidden = self.embed(step.tokens)
        for layer, block in enumerate(self.weights.blocks):
            q = self._queries(layer, hidden, step.positions, step.slots, cache)
            attended = self._attend_cache(layer, q, cache, step.lengths, max_length)
            hidden = self._behind_attention(block, hidden, attended)
        return self.logits(hidden, out)

    def _attend_cache(
        self,
        layer: int,
        q: Tensor,
        cache: StaticCache,
        lengths: Tensor,
        max_length: int,
        pages: Tensor | None = None,
    ) -> Tensor:
        """q [B, Hq, D] -> int8 [B, Hq * D]; ``pages`` int32 [B, 1], None: page b."""
        block = self.weights.blocks[layer]
        attended = ops.kv_decode_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            block.k_scale,
            block.v_scale,
            block.prefix_key,
            block.prefix_value,
            lengths,
            pages,
            self.weights.kv_bits,
            max_length,
            self.scaling,
            self._attended_scale(block),
            block.o.bits[1],
        )
        return self._rotated(block, attended)

    # ---- both ----

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weights.embedding).to(self.weights.dtype)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        weights = self.weights
        return weights.head(ops.rmsnorm(hidden, weights.final_norm, weights.geometry.eps), out)

    def _queries(
        self, layer: int, hidden: Tensor, positions: Tensor, slots: Tensor, cache: StaticCache
    ) -> Tensor:
        """hidden [T, C] -> q [T, Hq, D]; appends keys and values to the cache."""
        block, weights, r3 = self.weights.blocks[layer], self.weights, self.weights.rotation
        return ops.rope_kv_append(
            block.qkv(block.input_norm(hidden)),
            self.cos,
            self.sin,
            positions,
            block.q_norm,
            block.k_norm,
            weights.geometry.eps,
            r3.signs,
            r3.size,
            block.k_shift,
            block.k_scale,
            block.v_scale,
            weights.kv_bits,
            cache.keys[layer],
            cache.values[layer],
            slots,
            weights.geometry.heads,
        )

    def _attended_scale(self, block: Block) -> Tensor | None:
        """What attention quantizes its output with; None where R5 comes first."""
        return block.o.input_scale if self.weights.attention_rotation.size == 1 else None

    def _rotated(self, block: Block, attended: Tensor) -> Tensor:
        """What the o projection reads, int8 [T, Hq * D], of attention's output."""
        r5 = self.weights.attention_rotation
        if r5.size > 1:
            attended = ops.hadamard_quantize(
                attended, r5.signs, r5.size, block.o.input_scale, block.o.bits[1]
            )
        return self._levels(attended)

    def _levels(self, q: Tensor) -> Tensor:
        """int8 as the quantization left it -> the levels that a linear reads."""
        return ops.compand_(q) if self.weights.companded else q

    def _behind_attention(self, block: Block, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a block: [T, C], of hidden [T, C] and attended int8 [T, Hq * D]."""
        r4 = self.weights.mlp_rotation
        hidden = block.o(attended, residual=hidden)
        gate, up = block.gate_up(block.post_norm(hidden)).chunk(2, dim=-1)
        inner = ops.swiglu_hadamard_quantize(
            gate, up, r4.signs, r4.size, block.down.input_scale, block.down.bits[1]
        )
        return block.down(self._levels(inner), residual=hidden)


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
