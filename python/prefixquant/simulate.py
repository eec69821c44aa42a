# SPDX-License-Identifier: Apache-2.0
"""A checkpoint run by fake quantization: float products on dequantized weights and activations.

The slow twin of `prefixquant.load`, made of the blocks that calibration worked with. The packed
kernels are held against it, and it runs on any device that torch has.
"""

import os
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from prefixquant.block import BlockScales, BlockShape, PrefixKV, block_forward, rms_norm
from prefixquant.checkpoint import read_checkpoint
from prefixquant.checkpoint_layout import KEY_SHIFT, scale_tensor, shift_tensor
from prefixquant.packing import unpack_weight
from prefixquant.roles import BlockWeights, model_geometry, model_roles


class SimulatedModel:
    """Called like a transformers model, ``model(input_ids=ids).logits``; no cache, no padding.

    Args:
        path: a checkpoint folder.
        device: where it runs; all in float32.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        checkpoint = read_checkpoint(path)
        self.device = torch.device(device)
        self.tensors = checkpoint.tensors
        self.quantization = checkpoint.quantization
        self.config = checkpoint.hf_config()
        self.roles = model_roles(self.config)
        self.geometry = model_geometry(self.config)
        self.shape = BlockShape.of(self.geometry, self.quantization.rotations)
        self.rotary = _rotary_embedding(self.config).to(self.device)
        self.blocks = [self._block(i) for i in range(self.geometry.layers)]
        self.embedding = self._float(f"{self.roles.embedding}.weight")
        self.final_norm = self._float(f"{self.roles.final_norm}.weight")
        self.head = self._float(f"{self.roles.head}.weight")

    def _float(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device, torch.float32)

    def _block(self, index: int) -> tuple[BlockWeights, PrefixKV, BlockScales]:
        roles, name = self.roles, f"{self.roles.blocks}.{index}"
        attention = f"{name}.{roles.attention}"
        weights, biases = {}, {}
        for role, path in roles.linears.items():
            bits = self.quantization.weight_bits
            solved = unpack_weight(self.tensors, f"{name}.{path}", bits)
            weights[role] = solved.dequantize().to(self.device)
            bias = f"{name}.{path}.bias"
            biases[role] = self._float(bias) if bias in self.tensors else None
        norms = [roles.input_norm, roles.post_norm]
        if roles.qk_norm:
            norms += [f"{roles.attention}.q_norm", f"{roles.attention}.k_norm"]
        block = BlockWeights(weights, biases, *(self._float(f"{name}.{n}.weight") for n in norms))
        shifts = {point: shift_tensor(scale) for point, scale in roles.point_scales.items()}
        shifts["k"] = f"{roles.attention}.{KEY_SHIFT}"
        for point, shift in shifts.items():
            if f"{name}.{shift}" in self.tensors:
                block.shifts[point] = self._float(f"{name}.{shift}")

        scheme = self.quantization.scheme
        scales = BlockScales(
            activation_bits=scheme.activation_bits,
            kv_bits=scheme.kv_bits,
            activation_mode=scheme.activation_mode,
            kv_mode=scheme.kv_mode,
            companded=scheme.companded,
        )
        if scheme.activation_bits < 16:
            scales.activations = {
                point: self._float(f"{name}.{scale_tensor(path, scheme.activation_mode)}")
                for point, path in roles.point_scales.items()
            }
        if scheme.kv_bits < 16:
            names = (scale_tensor(f"{part}_scale", scheme.kv_mode) for part in "kv")
            scales.k, scales.v = (self._float(f"{attention}.{n}") for n in names)
        if self.quantization.prefix_token_ids:
            prefix = PrefixKV(*(self._float(f"{attention}.prefix_{p}") for p in ("key", "value")))
        else:
            empty = torch.zeros(self.geometry.kv_heads, 0, self.geometry.head_dim)
            prefix = PrefixKV(empty.to(self.device), empty.to(self.device))
        return block, prefix, scales

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, blocks: int | None = None) -> Tensor:
        """ids [B, T] -> the final normed hidden states, float32 [B, T, C].

        With ``blocks`` the residual stream after that many blocks, not normed.
        """
        positions = torch.arange(input_ids.shape[1], device=self.device)[None]
        x = self.embedding[input_ids.to(self.device)]
        cos, sin = self.rotary(x, positions)
        for block, prefix, scales in self.blocks[:blocks]:
            x = block_forward(block, self.shape, x, (cos[0], sin[0]), prefix, scales)
        if blocks is not None:
            return x
        return rms_norm(x, self.final_norm, self.geometry.eps)

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        if use_cache:
            raise ValueError("use_cache: the simulated model has no cache")
        return SimpleNamespace(logits=self.hidden(input_ids) @ self.head.T)


def _rotary_embedding(config) -> nn.Module:
    """The model's own RoPE module; only it leaves the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return type(model.get_submodule(model_roles(config).decoder).rotary_emb)(config)
