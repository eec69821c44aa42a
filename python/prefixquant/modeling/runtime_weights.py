# SPDX-License-Identifier: Apache-2.0
"""The runtime on the tensors of a loaded model: one copy of the weights serves both."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from prefixquant.errors import UnsupportedModelError
from prefixquant.modeling.cache import KVQuantizer
from prefixquant.modeling.linear import (
    QuantLinear,
    QuantMLP,
    QuantRMSNorm,
    SixteenBitEmbedding,
    SixteenBitHead,
)
from prefixquant.modeling.linear import Rotation as RotationModule
from prefixquant.ops.gemm import PREPACKED_SHAPES
from prefixquant.roles import Roles, model_blocks, model_geometry, model_roles
from prefixquant.runtime.head import Head16
from prefixquant.runtime.weights import Block, Linear, Norm, Rotation, Weights


def runtime_weights(model: nn.Module) -> Weights:
    """What `prefixquant.runtime.Runtime` computes with, of a model that `prefixquant.load` or
    ``from_pretrained`` has loaded.

    All tensors are the model's. The runtime multiplies q, k and v as one matrix: where their rows
    end at blocks of the kernel layout, the model's weights become parts of that matrix; otherwise
    it is a copy.

    Raises:
        UnsupportedModelError: the runtime has no operations for this model.
    """
    roles = model_roles(model.config)
    blocks = list(model_blocks(model, roles))
    _check(model)
    kv: KVQuantizer = blocks[0].get_submodule(roles.attention).kv_quantizer
    mlp: QuantMLP = blocks[0].get_submodule(roles.mlp)
    o: QuantLinear = blocks[0].get_submodule(roles.linears["o"])
    embedding: SixteenBitEmbedding = model.get_submodule(roles.embedding)
    head: SixteenBitHead = model.get_submodule(roles.head)
    dtype = embedding.compute_dtype
    return Weights(
        geometry=model_geometry(model.config),
        config=model.config,
        kv_bits=kv.bits,
        rotation=_rotation(kv.rotation),
        mlp_rotation=_rotation(mlp.rotation),
        attention_rotation=_rotation(o.rotation),
        companded=o.companded,
        embedding=embedding.weight,
        blocks=[_block(block, roles, dtype) for block in blocks],
        final_norm=model.get_submodule(roles.final_norm).weight.detach(),
        head=Head16(head.weight),
        dtype=dtype,
    )


def _check(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, QuantLinear):
            continue
        if (
            module.activation_bits == 16
            or module.dynamic
            or module.outliers is not None
            or module.weight_bits not in (4, 8)
        ):
            raise UnsupportedModelError(
                "the runtime runs weights of 4 or 8 bits without outliers and statically quantized "
                f"activations, got {module}"
            )
    if getattr(model.config, "distributed_config", None) is not None:
        raise UnsupportedModelError("the runtime runs on one device, got a part of a model")


def _block(block: nn.Module, roles: Roles, dtype: torch.dtype) -> Block:
    attention = block.get_submodule(roles.attention)
    kv: KVQuantizer = attention.kv_quantizer
    mlp: QuantMLP = block.get_submodule(roles.mlp)
    q_norm = attention.q_norm.weight.detach() if roles.qk_norm else None
    k_norm = attention.k_norm.weight.detach() if roles.qk_norm else None
    return Block(
        input_norm=_norm(block.get_submodule(roles.input_norm), dtype),
        qkv=_stacked([block.get_submodule(roles.linears[role]) for role in ("q", "k", "v")]),
        q_norm=q_norm,
        k_norm=k_norm,
        k_shift=kv.k_shift,
        k_scale=kv.k_scale,
        v_scale=kv.v_scale,
        prefix_key=kv.prefix_key,
        prefix_value=kv.prefix_value,
        o=_linear(block.get_submodule(roles.linears["o"])),
        post_norm=_norm(block.get_submodule(roles.post_norm), dtype),
        gate_up=_linear(mlp.gate_up_proj),
        down=_linear(mlp.down_proj),
    )


def _norm(norm: QuantRMSNorm, dtype: torch.dtype) -> Norm:
    weight = None if norm.weight is None else norm.weight.to(dtype)
    rotation = _rotation(norm.rotation)
    return Norm(weight, norm.eps, norm.input_scale, norm.bits, norm.shift, rotation, norm.companded)


def _rotation(rotation: RotationModule | None) -> Rotation:
    return Rotation(1, None) if rotation is None else Rotation(rotation.size, rotation.signs)


def _linear(linear: QuantLinear) -> Linear:
    return Linear(
        linear.weight,
        linear.weight_scale,
        linear.input_scale,
        linear.bias,
        (linear.weight_bits, linear.container_bits),
        linear.compute_dtype,
    )


def _stacked(linears: Sequence[QuantLinear]) -> Linear:
    """Linears of one input as one product."""
    first = linears[0]
    weight = first.prepack(torch.cat([linear.canonical_weight() for linear in linears]))
    _share(linears, weight)
    biases = [linear.bias for linear in linears]
    return Linear(
        weight,
        torch.cat([linear.weight_scale for linear in linears]),
        first.input_scale,
        None if biases[0] is None else torch.cat(biases),
        (first.weight_bits, first.container_bits),
        first.compute_dtype,
    )


def _share(linears: Sequence[QuantLinear], stacked: torch.Tensor) -> None:
    """Makes the linears' weights parts of the stacked one, if blocks of rows allow it."""
    shape = PREPACKED_SHAPES[stacked.device.type]

    def blocks(rows: int) -> int:
        return shape(linears[0].weight_bits, rows, linears[0].in_features)[0]

    ends = list(itertools.accumulate(linear.out_features for linear in linears))
    # A block with room for one row more would also hold rows of the next linear.
    if any(blocks(end + 1) == blocks(end) for end in ends[:-1]):
        return
    begins = [0, *ends[:-1]]
    for linear, begin, end in zip(linears, begins, ends, strict=True):
        linear.weight = stacked[blocks(begin) : blocks(end)]
