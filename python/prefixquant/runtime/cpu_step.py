# SPDX-License-Identifier: Apache-2.0
"""The decode step on a CPU: all blocks in one call, bit for bit what `Decoder.decode` computes.

A small model is done with a block in some 100 us; nine calls a block through torch would take
longer than the work.
"""

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.runtime.cache import StaticCache
from prefixquant.runtime.decoder import Decoder, Step
from prefixquant.runtime.weights import Linear

# DecoderStep::kMaxRows. With more sequences the products take longer than the calls.
MAX_SEQUENCES = 16


class CpuStep:
    """`Decoder.decode` for one cache."""

    def __init__(self, decoder: Decoder, cache: StaticCache):
        self.decoder = decoder
        self.cache = cache
        # The call reads these tensors by address: they live as long as this object.
        self._kept: list[object] = [decoder.cos, decoder.sin, cache]
        self._step = None
        if decoder.weights.dtype == torch.float32:
            self._step = self._whole_decoder()

    def decode(self, step: Step, max_length: int) -> Tensor:
        """float32 [B, V], the logits behind the tokens of the step."""
        decoder = self.decoder
        if self._step is None or len(step.tokens) > MAX_SEQUENCES:
            return decoder.decode(step, self.cache, max_length)
        hidden = decoder.embed(step.tokens)
        self._step.run(
            hidden=hidden, positions=step.positions, slots=step.slots, lengths=step.lengths
        )
        return decoder.logits(hidden)

    def _whole_decoder(self) -> object:
        weights, cache = self.decoder.weights, self.cache
        geometry, first = weights.geometry, weights.blocks[0]
        step = _C.DecoderStep(
            sizes=[
                geometry.hidden,
                geometry.intermediate,
                geometry.heads,
                geometry.kv_heads,
                geometry.head_dim,
                *first.qkv.bits,
                weights.kv_bits,
            ],
            companded=weights.companded,
            eps=geometry.eps,
            scaling=self.decoder.scaling,
            cos=self.decoder.cos,
            sin=self.decoder.sin,
            rotation_signs=weights.rotation.signs,
            rotation_size=weights.rotation.size,
            mlp_signs=weights.mlp_rotation.signs,
            mlp_size=weights.mlp_rotation.size,
            attention_signs=weights.attention_rotation.signs,
            attention_size=weights.attention_rotation.size,
            norm_signs=first.input_norm.rotation.signs,
            norm_size=first.input_norm.rotation.size,
        )
        for layer, block in enumerate(weights.blocks):
            step.add_block(
                input_norm=block.input_norm.weight,
                input_shift=block.input_norm.shift,
                qkv=self._linear(block.qkv),
                attention=(
                    block.q_norm,
                    block.k_norm,
                    block.k_shift,
                    block.k_scale,
                    block.v_scale,
                    block.prefix_key,
                    block.prefix_value,
                    cache.keys[layer],
                    cache.values[layer],
                ),
                o=self._linear(block.o),
                post_norm=block.post_norm.weight,
                post_shift=block.post_norm.shift,
                gate_up=self._linear(block.gate_up),
                down=self._linear(block.down),
            )
        return step

    def _linear(self, linear: Linear) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        bias = None if linear.bias is None else linear.bias.float()
        self._kept.append(bias)
        return linear.weight, linear.weight_scale, linear.input_scale, bias
