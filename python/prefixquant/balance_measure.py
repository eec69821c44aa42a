# SPDX-License-Identifier: Apache-2.0
"""The balance of a model's blocks (`prefixquant.balance`), measured on samples."""

from dataclasses import replace

import torch
from torch import Tensor

from prefixquant.balance import BlockBalance, balanced, balanced_heads
from prefixquant.counted import Counted
from prefixquant.decoder import FloatDecoder
from prefixquant.observe import observe_blocks
from prefixquant.roles import POINTS, BlockWeights, Geometry

_NORMED = {point: POINTS[point] for point in ("qkv", "gate_up")}


def measure_balance(
    decoder: FloatDecoder,
    samples: Tensor,
    prefix: tuple[int, ...],
    counted: Counted,
    *,
    norms: bool = False,
    centred: bool = False,
) -> list[BlockBalance]:
    """The balance of every block on samples, with the prefix in place.

    Args:
        decoder: without rotations, and without a balance.
        samples: int64 [n, T].
        prefix: its tokens.
        counted: the tokens that count.
        norms: whether what the norms give has a balance: with R6.
        centred: whether its mean is going to be taken out, so that its deviation counts.
    """
    found = []
    for block, batches in observe_blocks(decoder, samples, prefix, counted):
        sums = _SquareSums()
        streams = {point: _Moments() for point in _NORMED} if norms else {}
        for seen, mask in batches:
            sums.add(seen, mask)
            for point, moments in streams.items():
                moments.add(seen[point][mask])
        behind = {p: m.balance(block, _NORMED[p], centred) for p, m in streams.items()}
        found.append(replace(sums.balance(block, decoder.geometry), **behind))
    return found


class _Moments:
    """First and second moments over tokens of what a norm gives, by channel."""

    def __init__(self) -> None:
        self.tokens, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        wide = rows.double()
        self.tokens += len(rows)
        self.sum = self.sum + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)

    def balance(self, block: BlockWeights, readers: tuple[str, ...], centred: bool) -> Tensor:
        made = self.squares
        if centred:
            made = (made - self.sum.square() / max(1, self.tokens)).clamp_min(0)
        read = sum(block.weights[role].double().square().sum(0) for role in readers)
        return balanced(made, read).float()


class _SquareSums:
    """Sums of squares over tokens: of o_proj's and down_proj's inputs by channel, of q and k by
    head and channel."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, seen: dict[str, Tensor], mask: Tensor) -> None:
        for name in ("q", "k", "attended", "down"):
            value = seen[name].transpose(1, 2) if name in "qk" else seen[name]  # [B, T, ...]
            total = value[mask].double().square().sum(0)
            self.sums[name] = self.sums.get(name, 0) + total

    def balance(self, block: BlockWeights, geometry: Geometry) -> BlockBalance:
        def by_kv_head(squares: Tensor) -> Tensor:  # of all query heads -> [H_kv, D]
            return squares.view(geometry.kv_heads, -1, geometry.head_dim).sum(1)

        columns = {role: block.weights[role].double().square().sum(0) for role in ("o", "down")}
        q, k = by_kv_head(self.sums["q"]), self.sums["k"]
        if block.k_norm is not None:  # one weight for all heads
            q, k = (t.sum(0, keepdim=True).expand_as(t) for t in (q, k))
        q, k = (t.unflatten(-1, (2, -1)).sum(-2) for t in (q, k))  # RoPE's pairs
        pairs = balanced_heads(k, q)
        return BlockBalance(
            inner=balanced(self.sums["down"], columns["down"]).float(),
            value=balanced(by_kv_head(self.sums["attended"]), by_kv_head(columns["o"])).float(),
            key=torch.cat((pairs, pairs), -1).float(),
        )
