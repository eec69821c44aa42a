# SPDX-License-Identifier: Apache-2.0
"""A transformers model as embedding, rotated blocks and head, one block in memory at a time."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixquant.balance import BlockBalance, balance_block
from prefixquant.block import BlockShape, PrefixKV, Tap, block_forward, no_tap
from prefixquant.centre import BlockCentre, centre_block
from prefixquant.roles import (
    BlockWeights,
    block_weights,
    model_blocks,
    model_geometry,
    model_roles,
    rope_tables,
)
from prefixquant.rotate import RotationPlan, rotate_block, rotate_embedding, rotate_head


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Puts the float model on the device where it takes less than half of the free memory; a larger
    one stays where it is, and `compute_device` gives the device its blocks go to, one at a time."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2:
        model.prefixquant_compute_device = device
        return model
    return model.to(device)


def compute_device(model: nn.Module) -> torch.device:
    """Where blocks of the model are computed: beside its weights, if `place_model` did not keep
    those on the host."""
    return getattr(model, "prefixquant_compute_device", next(model.parameters()).device)


class FloatDecoder:
    """The float model with rotations applied and norms folded (with R6 only the last one), without
    a second copy of it.

    ``model`` is left as it is. A block's rotated weights are made when asked for and belong to the
    caller; the embedding and the head are rotated by the slice they are used on.

    Args:
        model: a transformers causal LM of a supported family.
        plan: the rotations.
        dtype: the dtype of all computation and of the blocks handed out.
        device: where blocks are computed.
        balance: of every block, applied before the rotations; None: the weights as they are.
        centre: of every block, applied behind the rotations; None: nothing is subtracted.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: RotationPlan,
        *,
        dtype=torch.float32,
        device="cpu",
        balance: list[BlockBalance] | None = None,
        centre: list[BlockCentre] | None = None,
    ):
        self.model = model
        self.plan = plan
        self.dtype = dtype
        self.device = torch.device(device)
        self.balance = balance
        self.centre = centre
        self.roles = model_roles(model.config)
        self.geometry = model_geometry(model.config)
        self.shape = BlockShape.of(self.geometry, plan.rotations)
        self._blocks = model_blocks(model, self.roles)

    def __len__(self) -> int:
        return len(self._blocks)

    def stream_only(self) -> "FloatDecoder":
        """The same model with the same residual stream, from blocks with as little to compute as
        can be: no rotation but that of the stream, no balance, no means taken out."""
        plan = self.plan.stream_only
        return FloatDecoder(self.model, plan, dtype=self.dtype, device=self.device)

    def block(self, index: int) -> BlockWeights:
        """The rotated weights of one block, in `dtype` on `device`."""
        wide = block_weights(self._blocks[index], self.roles).to(
            device=self.device, dtype=torch.float32
        )
        if self.balance is not None:
            wide = balance_block(wide, self.balance[index], self.geometry)
        rotated = rotate_block(wide, self.plan)
        if self.centre is not None:
            rotated = centre_block(rotated, self.centre[index], self.geometry, self.plan.r5_size)
        return rotated.to(dtype=self.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> rotated residual stream [B, T, C]."""
        rows = self.model.get_submodule(self.roles.embedding).weight.detach()
        unique, inverse = ids.unique(return_inverse=True)
        rotated = rotate_embedding(rows[unique.to(rows.device)].float(), self.plan)
        return rotated.to(device=self.device, dtype=self.dtype)[inverse.to(self.device)]

    def embedding_weight(self) -> Tensor:
        """The rotated embedding [V, C], in the model's dtype."""
        rows = self.model.get_submodule(self.roles.embedding).weight.detach()
        return rotate_embedding(rows, self.plan)

    def head_weight(self) -> Tensor:
        """The rotated head [V, C] with the final norm folded in, in the model's dtype."""
        head = self.model.get_submodule(self.roles.head).weight.detach()
        norm = self.model.get_submodule(self.roles.final_norm).weight.detach()
        return rotate_head(head, norm, self.plan)

    def rope(self, length: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + length, device=self._rope_device())
        return tuple(t.to(self.device) for t in rope_tables(self.model, self.roles, positions))

    def _rope_device(self) -> torch.device:
        return self.model.get_submodule(self.roles.embedding).weight.device

    def prefix(self, token_ids: tuple[int, ...]) -> list[PrefixKV]:
        """K (after RoPE at positions -P..-1, and R3) and V of the prefix in every block."""
        if not token_ids:
            return [self._no_prefix() for _ in range(len(self))]
        through = self.prefix_stream(token_ids)
        return [through(self.block(index)) for index in range(len(self))]

    def prefix_stream(self, token_ids: tuple[int, ...]) -> Callable[[BlockWeights], PrefixKV]:
        """The prefix on its way through the blocks, for who has them at hand: called with one block
        after the other, gives its K and V there, as `prefix`."""
        if not token_ids:
            return lambda block: self._no_prefix()
        x = self.embed(torch.tensor([token_ids], dtype=torch.long))
        rope = self.rope(len(token_ids), start=-len(token_ids))

        def through(block: BlockWeights) -> PrefixKV:
            nonlocal x
            seen: dict[str, Tensor] = {}
            x = block_forward(block, self.shape, x, rope, tap=seen.__setitem__)
            return PrefixKV(seen["k"][0].clone(), seen["v"][0].clone())

        return through

    def _no_prefix(self) -> PrefixKV:
        shape = (self.geometry.kv_heads, 0, self.geometry.head_dim)
        empty = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return PrefixKV(empty, empty)

    def run(
        self,
        samples: Tensor,
        prefix: list[PrefixKV],
        *,
        batch: int = 4,
        tap: Tap = no_tap,
    ) -> Iterator[tuple[int, Tensor]]:
        """Runs ids [n, T] through all blocks, all samples block by block.

        Yields (block index, residual stream after it [n, T, C]); ``tap`` is called for every batch.
        """
        x = self.embed(samples)
        rope = self.rope(samples.shape[1])
        for index in range(len(self)):
            block = self.block(index)
            for part in x.split(batch):  # a view: the stream is updated in place
                part.copy_(block_forward(block, self.shape, part, rope, prefix[index], tap=tap))
            yield index, x

    def token_losses(self, x: Tensor, ids: Tensor, head: Tensor) -> Tensor:
        """Negative log-likelihood [B, T-1] of ids[:, 1:] given the final residual stream x."""
        logits = self.logits(x[:, :-1], head)
        return F.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none"
        ).view(x.shape[0], -1)

    def logits(self, x: Tensor, head: Tensor) -> Tensor:
        """Float32 logits; ``head`` is `head_weight()`, rotated with the norm folded in."""
        normed = x.float() * torch.rsqrt(
            x.float().square().mean(-1, keepdim=True) + self.geometry.eps
        )
        return F.linear(normed.to(self.dtype), head.to(normed.device, self.dtype)).float()
