# SPDX-License-Identifier: Apache-2.0
"""The static mean of what a linear reads, taken out before it is quantized.

Behind a prefix most of an activation is one vector that all tokens share (SmolLM2-135M: 74 % of the
energy that q, k and v read, 66 % of o_proj's input, 58 % of what gate and up read, 48 % of V).
Rotations keep it, and a grid that is symmetric around zero spends its levels on it. With m the
mean,

    W x  =  W (x - m) + W m,

x - m is quantized, and W m, in the float weight, is a bias: the mean takes no part in the errors of
the activations nor in those of the weight. The model computes what it computed before. Where a mean
goes:

- what q, k and v read, and what gate and up read: subtracted behind the RMSNorm (and R6);
- o_proj's input: it is an average of values, with weights that sum to 1. With ``v' = v - n`` for
  every token and every prefix token, attention gives ``o - n``. So n is a bias of v_proj, V is
  centred with it, and nothing is subtracted at run time. One n [H_kv, D] for the query heads that
  share a KV head: the mean of the attention's output over them.

- the keys, behind RoPE and R3, where the cache quantizes them: one vector n [H_kv, D] taken from
  all keys of a head, those of the prefix too, takes q.n from all logits of a query, which the
  softmax does not notice. It is subtracted as a key is written to the cache. RoPE turns the mean
  of the keys before it (88 % of their energy) with the position; n is the average of the turned
  means over the first `KEY_POSITIONS` positions of the context, so that it holds what turns slowly
  and nothing that fits one stretch alone. SmolLM2-135M: n takes out 45 % of the energy at
  positions below 1024, 51, 48 and 27 % in the next 1024, 2048 and 2048, 1 % beyond 6144.

Of down_proj's input the mean is 38 %; it is left in.

Outlier Suppression+ (Wei et al., arXiv 2304.09145, section 4.1) shifts channels by the middle of
their range for models without rotations; there it takes outlier channels out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefixquant.roles import BlockWeights, Geometry
from prefixquant.rotate import rotate_last_dim

KEY_POSITIONS = 4096  # that the mean of the keys is an average over, or all where there are fewer


@dataclass(frozen=True)
class BlockCentre:
    """The means of a block's activations, float32, in the basis of its rotated weights; all but
    those of the keys have values of bfloat16."""

    qkv: Tensor  # [C]: the normed residual stream before attention
    gate_up: Tensor  # [C]: and before the MLP
    value: Tensor  # [H_kv, D]: attention's output, before R5
    key: Tensor | None = None  # [H_kv, D]: the keys behind RoPE and R3; None: not taken out


def centre_block(
    block: BlockWeights, centre: BlockCentre, geometry: Geometry, r5_size: int = 1
) -> BlockWeights:
    """The same block, function for function, after its rotations. Every linear has a bias then.

    Args:
        r5_size: the size of the R5 blocks that o_proj's columns are rotated in; 1 is none.
    """
    biases = dict(block.biases)

    def add(role: str, vector: Tensor) -> None:
        biases[role] = vector if biases[role] is None else biases[role] + vector

    def moved(role: str, mean: Tensor) -> Tensor:
        return (block.weights[role].double() @ mean.double()).to(mean.dtype)

    given = {name: t for name, t in vars(centre).items() if t is not None}
    centre = BlockCentre(**{name: t.to(block.input_norm) for name, t in given.items()})
    for role in ("q", "k", "v"):
        add(role, moved(role, centre.qkv))
    add("v", -centre.value.flatten())
    group = geometry.heads // geometry.kv_heads
    attended = centre.value.repeat_interleave(group, 0).flatten()
    add("o", moved("o", rotate_last_dim(attended, r5_size)))
    for role in ("gate", "up"):
        add(role, moved(role, centre.gate_up))
    add("down", torch.zeros_like(block.post_norm))
    shifts = {"qkv": centre.qkv, "gate_up": centre.gate_up, "k": centre.key}
    return replace(
        block, biases=biases, shifts={name: t for name, t in shifts.items() if t is not None}
    )
