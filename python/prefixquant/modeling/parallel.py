# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: each rank holds the heads and the channels that are its own.

q, k, v, gate and up are cut by output channels, o_proj and down_proj by input channels; the sums of
these two are added up across ranks. K/V scales, the keys' shift and the prefix are cut by KV head.
Static scales of activations are one per tensor and need no maximum across ranks. R4 mixes channels
and R5 heads, so their blocks must fit a rank's part: quantize with ``--r4-block-size`` and
``--r5-block-size``. R6 is over the residual stream, which every rank has whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixquant.checkpoint import Checkpoint
from prefixquant.checkpoint_layout import KEY_SHIFT
from prefixquant.errors import UserError
from prefixquant.roles import Roles

_BY_OUTPUT = ("q", "k", "v", "gate", "up")
_BY_INPUT = ("o", "down")


@dataclass(frozen=True)
class Shard:
    """The part of one rank. ``group``: the torch.distributed process group; None is the default."""

    rank: int
    size: int
    group: Any = None

    def check(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            UserError: the model cannot be cut in so many parts.
        """
        sizes, quantization = checkpoint.sizes, checkpoint.quantization
        rotations = quantization.rotations
        if sizes.num_kv_heads % self.size:
            raise UserError(
                "tensor parallel: expected a number of ranks that divides the "
                f"{sizes.num_kv_heads} KV heads, got {self.size}"
            )
        for name, block, width in (
            ("R4", rotations.r4_size, sizes.intermediate_size),
            ("R5", rotations.r5_size, sizes.attended_size),
        ):
            if width % (self.size * block):
                raise UserError(
                    f"tensor parallel: {name} blocks of {block} do not fit the {self.size} parts "
                    f"of {width} channels; quantize with a smaller --{name.lower()}-block-size"
                )
        if quantization.outlier_fraction or quantization.group_size:
            raise UserError("tensor parallel: expected weights without groups and outliers")

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's equal part of ``tensor`` along ``dim``."""
        return tensor.chunk(self.size, dim)[self.rank].contiguous()


class ShardedTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors, each cut to the part of one rank where it is cut at all."""

    def __init__(self, tensors: Mapping[str, Tensor], roles: Roles, shard: Shard):
        self._tensors = tensors
        self._shard = shard
        self._dims: dict[str, int] = {}  # end of a name -> the dimension that is cut
        for role in _BY_OUTPUT:
            for part in ("weight_packed", "weight_scale", "bias"):
                self._dims[f"{roles.linears[role]}.{part}"] = 0
        for role in _BY_INPUT:
            self._dims[f"{roles.linears[role]}.weight_packed"] = 1
        for part in ("k_scale", "v_scale", KEY_SHIFT, "prefix_key", "prefix_value"):
            self._dims[f"{roles.attention}.{part}"] = 0
        # A bias of summed linears is added once.
        self._once = {f"{roles.linears[role]}.bias" for role in _BY_INPUT} if shard.rank else set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        dim = self._dims.get(_inside_block(name))
        tensor = self._tensors[name]
        return tensor if dim is None else self._shard.part(tensor, dim)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors and _inside_block(str(name)) not in self._once

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _inside_block(name: str) -> str:
    """``model.layers.3.mlp.up_proj.bias`` -> ``mlp.up_proj.bias``; other names as they are."""
    parts = name.split(".")
    return ".".join(parts[3:]) if len(parts) > 3 and parts[2].isdigit() else name


def add_up(block: nn.Module, roles: Roles, shard: Shard) -> None:
    """Adds the outputs of o_proj and down_proj up across the ranks."""

    def reduce(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        torch.distributed.all_reduce(output, group=shard.group)
        return output

    for role in _BY_INPUT:
        block.get_submodule(roles.linears[role]).register_forward_hook(reduce)


def shard_of(config: Any) -> Shard | None:
    """This process's part, as ``from_pretrained(distributed_config=...)`` asks for it.

    Raises:
        UserError: another kind of parallelism, or groups beside the one of all ranks.
    """
    wanted = getattr(config, "distributed_config", None)
    if wanted is None:
        return None
    for name in ("fsdp_size", "pp_size", "ep_size", "dp_replicate_size"):
        if (getattr(wanted, name, None) or 1) > 1:
            raise UserError(f"distributed_config: expected tensor parallelism alone, got {name}")
    size = getattr(wanted, "tp_size", None) or 1
    if size == 1:
        return None
    world = torch.distributed.get_world_size()
    if size != world:
        raise UserError(f"distributed_config: expected tp_size {world}, all ranks, got {size}")
    return Shard(torch.distributed.get_rank(), size)
