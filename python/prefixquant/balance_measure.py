# SPDX-License-Identifier: Apache-2.0
"""The balance of a model's blocks (`prefixquant.balance`), measured on samples."""

from dataclasses import replace

import torch
from torch import Tensor

from prefixquant.balance import BlockBalance, balanced, balanced_heads
from prefixquant.block import head_projection
from prefixquant.centre_measure import key_positions, turned_mean
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
    keys: bool = False,
) -> list[BlockBalance]:
    """The balance of every block on samples, with the prefix in place.

    Args:
        decoder: without rotations, and without a balance.
        samples: int64 [n, T].
        prefix: its tokens.
        counted: the tokens that count.
        norms: whether what the norms give has a balance: with R6.
        centred: whether means are going to be taken out, of it and of V, so that what is left of
            them counts.
        keys: whether that of the keys is too.
    """
    found = []
    rope = decoder.rope(key_positions(decoder)) if keys else None
    for block, batches in observe_blocks(decoder, samples, prefix, counted):
        sums = _HeadSums(centred, rope)
        streams = {point: _Moments() for point in _NORMED} if norms else {}
        for seen, mask in batches:
            sums.add(seen, mask)
            if keys:
                sums.add_keys(head_projection(block, decoder.shape, "k", seen["qkv"][mask]))
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


class _HeadSums:
    """Sums over tokens of squares: of o_proj's and down_proj's inputs by channel, of q and k by
    head and channel; and of what means are made of.

    Args:
        centred: whether the mean of V is going to be taken out.
        rope: of the positions that the mean of the keys is an average over; None: it is left in.
    """

    def __init__(self, centred: bool, rope: tuple[Tensor, Tensor] | None):
        self.centred, self.rope = centred, rope
        self.tokens = 0
        self.squares: dict[str, Tensor | float] = dict.fromkeys(("q", "k", "attended", "down"), 0.0)
        self.attended: Tensor | float = 0.0  # [H*D]
        self.keys: Tensor | float = 0.0  # before RoPE, [H_kv, D]

    def add(self, seen: dict[str, Tensor], mask: Tensor) -> None:
        self.tokens += int(mask.sum())
        for name in self.squares:
            value = seen[name].transpose(1, 2) if name in "qk" else seen[name]  # [B, T, ...]
            self.squares[name] = self.squares[name] + value[mask].double().square().sum(0)
        self.attended = self.attended + seen["attended"][mask].double().sum(0)

    def add_keys(self, keys: Tensor) -> None:
        """The keys [N, H_kv, D] of the tokens that count, before RoPE."""
        self.keys = self.keys + keys.double().sum(0)

    def balance(self, block: BlockWeights, geometry: Geometry) -> BlockBalance:
        def by_kv_head(squares: Tensor) -> Tensor:  # of all query heads -> [H_kv, D]
            return squares.view(geometry.kv_heads, -1, geometry.head_dim).sum(1)

        columns = {role: block.weights[role].double().square().sum(0) for role in ("o", "down")}
        attended = by_kv_head(self.squares["attended"])
        if self.centred:  # of the group's heads one mean is taken out
            rows = self.tokens * geometry.heads // geometry.kv_heads
            mean = by_kv_head(self.attended) / max(1, rows)
            attended = (attended - rows * mean.square()).clamp_min(0)
        return BlockBalance(
            inner=balanced(self.squares["down"], columns["down"]).float(),
            value=balanced(attended, by_kv_head(columns["o"])).float(),
            key=self._key_balance(by_kv_head(self.squares["q"]), block).float(),
        )

    def _key_balance(self, q: Tensor, block: BlockWeights) -> Tensor:
        """[H_kv, D]; RoPE turns the two channels of a pair into each other, and leaves the sum of
        their squares."""
        k = self.squares["k"]
        if block.k_norm is not None:  # one weight for all heads
            q, k = (t.sum(0, keepdim=True).expand_as(t) for t in (q, k))
        q, k = (t.unflatten(-1, (2, -1)).sum(-2) for t in (q, k))
        if self.rope is not None:
            mean = turned_mean(self.keys / max(1, self.tokens), self.rope, 1).double()
            taken = self.tokens * mean.square().unflatten(-1, (2, -1)).sum(-2)
            if block.k_norm is not None:
                taken = taken.sum(0, keepdim=True)
            k = (k - taken).clamp_min(0)
        pairs = balanced_heads(k, q)
        return torch.cat((pairs, pairs), -1)
