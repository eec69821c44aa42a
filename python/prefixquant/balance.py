# SPDX-License-Identifier: Apache-2.0
"""Scales that move from one linear to the next before the rotations mix their channels.

Three times in a block a channel leaves one linear and enters another product with nothing
nonlinear in between, so that it can be divided by d_c where it is made and multiplied by d_c where
it is read:

- up_proj's outputs, ``silu(gate) * up``, down_proj's inputs;
- v_proj's outputs and o_proj's inputs, alike for the query heads that share a KV head;
- k_proj's outputs and q_proj's (they meet in the attention logits), alike for the two channels that
  RoPE turns into each other, and for the query heads that share a KV head. With q and k norms their
  weights carry it, alike for all heads.

With R6 behind the norms of a block their outputs are such a place too: the norm's weight is 1/d_c,
and the channel's columns in q, k and v (gate and up) are multiplied by g_c d_c, g the norm's weight
as it was. Without, d would be folded away: R1 needs norms that are alike for all channels.

Behind a Hadamard rotation errors lie evenly on all channels, whichever the values came from. With
a_c the root mean square of a channel and w_c that of what reads it, quantizing the activations or
the weights to a share e of their size leaves in the output

    e^2 (sum_c a_c^2 / d_c^2) (sum_c w_c^2 d_c^2)   >=   e^2 (sum_c a_c w_c)^2

(Cauchy-Schwarz), equal where d_c^2 = a_c / w_c. The model computes what it computed before. Where
a mean is taken out (`prefixquant.centre`), a_c is that of what is left: the standard deviation; of
the keys, whose mean RoPE turns with the position, what one vector leaves of them. A mean that
counted would take range from the channels that vary: the squared error that 4-bit keys make in the
logits is 1.05 % of their variance with one static scale a head, and was 1.25 % (SmolLM2-135M, ten
of its blocks; with a scale a token 0.78 and 0.94).

SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4) migrates maxima in this form for linears
that are not rotated; OSTQuant (Hu et al., arXiv 2501.13987) trains such scales beside rotations.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefixquant.roles import BlockWeights, Geometry

# A channel that is never made, or never read, has no best scale: d ends at this many times the
# mean, up and down.
_WIDEST = 32.0


@dataclass(frozen=True)
class BlockBalance:
    """What the channels of a block are divided by where they are made, float32; 1 on the geometric
    mean."""

    inner: Tensor  # [I]: up_proj's outputs
    value: Tensor  # [H_kv, D]: v_proj's
    key: Tensor  # [H_kv, D]: k_proj's; both halves of D alike
    qkv: Tensor | None = None  # [C]: the norm's before attention; None: without R6
    gate_up: Tensor | None = None  # [C]: the norm's before the MLP


def balance_block(block: BlockWeights, balance: BlockBalance, geometry: Geometry) -> BlockWeights:
    """The same block, function for function, before its rotations."""
    inner, value, key = (
        t.to(block.input_norm.device) for t in (balance.inner, balance.value, balance.key)
    )
    group = geometry.heads // geometry.kv_heads
    weights, biases = dict(block.weights), dict(block.biases)

    def scale_outputs(role: str, factors: Tensor) -> None:
        weights[role] = weights[role] * factors[:, None]
        if biases[role] is not None:
            biases[role] = biases[role] * factors

    norms = {}
    for name, given, readers in (
        ("input_norm", balance.qkv, "qkv"),
        ("post_norm", balance.gate_up, ("gate", "up")),
    ):
        if given is not None:
            norm = getattr(block, name)
            norms[name] = norm_weight(given).to(norm)
            # The columns take the inverse of what the norm has, not of what it was rounded from.
            factors = norm.double() / norms[name].double()
            for role in readers:
                weights[role] = (weights[role].double() * factors).to(weights[role].dtype)

    scale_outputs("up", 1 / inner)
    weights["down"] = weights["down"] * inner
    scale_outputs("v", 1 / value.flatten())
    weights["o"] = weights["o"] * value.repeat_interleave(group, 0).flatten()
    if block.k_norm is not None:
        return replace(
            block,
            weights=weights,
            biases=biases,
            **norms,
            q_norm=block.q_norm * key[0],
            k_norm=block.k_norm / key[0],
        )
    scale_outputs("k", 1 / key.flatten())
    scale_outputs("q", key.repeat_interleave(group, 0).flatten())
    return replace(block, weights=weights, biases=biases, **norms)


def norm_weight(d: Tensor) -> Tensor:
    """The weight 1/d of a norm, rounded to bfloat16; float16 has these values too, at most 32^2
    from 1 as they are. What a checkpoint stores is then what the columns were divided by."""
    return (1 / d.double()).to(torch.bfloat16)


def balanced(made: Tensor, read: Tensor) -> Tensor:
    """``d = sqrt(a / w)``, 1 on the geometric mean.

    Args:
        made: a^2, sums of squares by channel; read: w^2.
    """
    made, read = (t / t.mean() for t in (made, read))
    ratio = (made.sqrt() / read.sqrt()).nan_to_num(1.0, _WIDEST**2, _WIDEST**-2)
    d = ratio.clamp(_WIDEST**-2, _WIDEST**2).sqrt()
    return d / d.log().mean().exp()


def balanced_heads(made: Tensor, read: Tensor) -> Tensor:
    """The same for every head of [H, D], whose channels meet in sums of their own."""
    d = balanced(made, read)
    return d / d.log().mean(-1, keepdim=True).exp()
