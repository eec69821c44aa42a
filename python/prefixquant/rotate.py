# SPDX-License-Identifier: Apache-2.0
"""Norm folding and the rotations R1-R6, block by block in float64.

With H_n the orthonormal Hadamard matrix of `prefixquant.hadamard` and S a diagonal of random signs:

- R1, residual stream: ``x' = H S x``. Embedding rows and the inputs of q, k, v, gate, up and the
  head are multiplied by it; the outputs of o and down too.
- R2, each value head: ``v' = H v``; the output of v_proj and the input of o_proj.
- R3, q and k after RoPE: ``H q``, ``H k``, at run time.
- R4, input of down_proj: ``H d`` in blocks, at run time; its inverse is folded into down_proj here.
- R5, input of o_proj: ``H o`` in blocks of heads, at run time; its inverse is folded into o_proj
  here. Heads of one token differ in size, and each of them from token to token: behind R2 alone a
  scale that all share fits few of them. SmolLM2-135M with static 4-bit activations: the squared
  error of o_proj's outputs is 2.1 % in place of 4.3 (q, k and v 1.7, gate and up 2.1, down 1.3).

- R6, what a block's two norms give: ``H (rmsnorm(x) * w)`` over the whole hidden size, at run
  time; its inverse is folded into q, k, v, gate and up here. It takes the place of R1: the residual
  stream keeps its channels, and the weights w of the norms are free to even them out before they
  are mixed (`prefixquant.balance`).

R1-R4 are those of SpinQuant (arXiv 2405.16406, section 3); R5 is the online Hadamard across heads
of QuaRot (arXiv 2404.00456, section 4).

RMSNorm weights are folded into the linears that follow, so that R1 commutes with the norm. With R6
those of the blocks stay where they are.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from prefixquant.config import Rotations
from prefixquant.errors import UnsupportedModelError
from prefixquant.hadamard import hadamard_signs, split_size
from prefixquant.roles import BlockWeights, Geometry

# Up to this size a 16-bit product with the whole matrix is faster on a GPU's tensor cores than the
# two products with its factors and their transposes.
_DENSE_SIZE = 2048


@lru_cache(maxsize=64)
def _factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The factors of H_n = H_k (x) H_2^m: [k, k] with the 1/sqrt(n), [2^m, 2^m] of signs."""
    power, k = split_size(n)
    outer = hadamard_signs(k).to(device=device, dtype=dtype) / n**0.5
    return outer, hadamard_signs(power).to(device=device, dtype=dtype)


@lru_cache(maxsize=16)
def _dense_signs(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    power, k = split_size(n)
    signs = torch.kron(hadamard_signs(k).double(), hadamard_signs(power).double())
    return signs.to(device=device, dtype=dtype), n**-0.5


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rotate_last_dim(x: Tensor, size: int, *, inverse: bool = False) -> Tensor:
    """``H x`` on each block of ``size`` of the last dimension, in the dtype of a product with x; 1
    is none.
    ``inverse``: ``H^T x``, which takes it back.

    Differentiable and on any device; `prefixquant.ops.hadamard` is the same as one kernel.
    """
    if size == 1:
        return x
    dtype = _product_dtype(x)
    if x.is_cuda and dtype != torch.float32 and size <= _DENSE_SIZE:
        signs, norm = _dense_signs(size, dtype, x.device)
        return ((x.reshape(-1, size) @ (signs if inverse else signs.T)) * norm).reshape(x.shape)
    outer, inner = _factors(size, x.dtype, x.device)
    if inverse:
        outer = outer.T
    # Two plain matrix products: batched products of small factors are many times slower.
    blocks = x.reshape(-1, inner.shape[0]) @ inner  # symmetric (Sylvester)
    if outer.shape[0] == 1:
        return (blocks * outer).reshape(x.shape)
    blocks = blocks.view(-1, outer.shape[0], inner.shape[0]).transpose(1, 2)
    return (blocks @ outer.T).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class RotationPlan:
    """The rotations of one model: which, their sizes, and the signs of R1 [hidden]."""

    rotations: Rotations
    geometry: Geometry
    signs: Tensor  # float64 [hidden], +-1

    @property
    def stream_only(self) -> "RotationPlan":
        """R1 alone, if it is there: the same residual stream, and blocks that rotate nothing."""
        return replace(self, rotations=Rotations(self.rotations.r1, False, False, False))

    @property
    def r1_size(self) -> int:
        return self.geometry.hidden if self.rotations.r1 else 1

    @property
    def r2_size(self) -> int:
        return self.geometry.head_dim if self.rotations.r2 else 1

    @property
    def r3_size(self) -> int:
        return self.geometry.head_dim if self.rotations.r3 else 1

    @property
    def r4_size(self) -> int:
        return self.rotations.r4_size

    @property
    def r5_size(self) -> int:
        return self.rotations.r5_size

    @property
    def r6_size(self) -> int:
        return self.rotations.r6_size(self.geometry.hidden)


def plan_rotations(
    geometry: Geometry,
    *,
    rotate: bool = True,
    r4_block_size: int = 0,
    r5_block_size: int = 0,
    r6: bool = False,
    seed: int = 0,
) -> RotationPlan:
    """Checks that every size has a Hadamard matrix and draws the signs of R1.

    Args:
        rotate: False leaves all of them out.
        r4_block_size: 0 is the intermediate size, in one block.
        r5_block_size: 0 is all heads, in one block; 1 is no R5.
        r6: R6 in the place of R1.

    Raises:
        UnsupportedModelError: a size has no construction, ``r4_block_size`` does not divide the
            intermediate size, or ``r5_block_size`` the width of all heads.
    """
    attended = geometry.heads * geometry.head_dim
    r4_block = r4_block_size or geometry.intermediate
    r5_block = r5_block_size or attended
    if rotate:
        split_size(geometry.hidden)
        split_size(geometry.head_dim)
        _check_block("r4_block_size", r4_block, "the intermediate size", geometry.intermediate)
        _check_block("r5_block_size", r5_block, "the width of all heads", attended)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (geometry.hidden,), generator=generator).double() * 2 - 1
    none = Rotations(r1=False, r2=False, r3=False, r4=False)
    r5 = {"r5": True, "r5_block_size": r5_block} if r5_block > 1 else {}
    found = Rotations(r1=not r6, r4_block_size=r4_block, r6=r6, **r5)
    return RotationPlan(found if rotate else none, geometry, signs)


def _check_block(name: str, block: int, what: str, width: int) -> None:
    split_size(block)
    if width % block:
        raise UnsupportedModelError(f"{name}: expected a divisor of {what} {width}, got {block}")


def rotate_residual_rows(rows: Tensor, plan: RotationPlan) -> Tensor:
    """Each row r -> H S r: embedding rows, and rows of weights that read the residual stream."""
    if not plan.rotations.r1:
        return rows
    return rotate_last_dim(rows * plan.signs.to(rows.device), plan.r1_size)


def rotate_block(block: BlockWeights, plan: RotationPlan) -> BlockWeights:
    """The block with R1, R2 and the inverses of R4, R5 and R6 applied, its norms folded in but with
    R6; float64 inside, the dtype of the input outside. It must not be centred yet."""
    dtype = block.input_norm.dtype
    wide = block.to(dtype=torch.float64)
    weights, biases = dict(wide.weights), dict(wide.biases)
    head_dim = plan.geometry.head_dim

    for norm, readers in ((wide.input_norm, "qkv"), (wide.post_norm, ("gate", "up"))):
        for role in readers:
            if plan.rotations.r6:
                weights[role] = rotate_last_dim(weights[role], plan.r6_size)
            else:
                weights[role] = rotate_residual_rows(weights[role] * norm, plan)
    norms = block.input_norm, block.post_norm
    if not plan.rotations.r6:
        norms = tuple(torch.ones_like(norm) for norm in norms)

    # R2: v_proj's output rows, head by head, and o_proj's input columns.
    weights["v"] = (
        rotate_last_dim(weights["v"].T.unflatten(-1, (-1, head_dim)), plan.r2_size).flatten(-2).T
    )
    if biases["v"] is not None:
        biases["v"] = rotate_last_dim(
            biases["v"].unflatten(-1, (-1, head_dim)), plan.r2_size
        ).flatten()
    weights["o"] = rotate_last_dim(
        weights["o"].unflatten(-1, (-1, head_dim)), plan.r2_size
    ).flatten(-2)

    weights["o"] = rotate_last_dim(weights["o"], plan.r5_size)
    weights["down"] = rotate_last_dim(weights["down"], plan.r4_size)
    for role in ("o", "down"):
        weights[role] = rotate_residual_rows(weights[role].T, plan).T
        if biases[role] is not None:
            biases[role] = rotate_residual_rows(biases[role][None], plan)[0]

    return BlockWeights(
        {role: w.to(dtype).contiguous() for role, w in weights.items()},
        {role: None if b is None else b.to(dtype).contiguous() for role, b in biases.items()},
        *norms,
        block.q_norm,
        block.k_norm,
    )


def rotate_embedding(embedding: Tensor, plan: RotationPlan, rows: int = 4096) -> Tensor:
    """Embedding [V, C], each row rotated; in slices, so that no float64 copy of it exists."""
    return torch.cat(
        [
            rotate_residual_rows(part.double(), plan).to(embedding.dtype)
            for part in embedding.split(rows)
        ]
    )


def rotate_head(head: Tensor, final_norm: Tensor, plan: RotationPlan, rows: int = 4096) -> Tensor:
    """Head [V, C] with the final norm folded in and its input rotated."""
    norm = final_norm.double()
    return torch.cat(
        [
            rotate_residual_rows(part.double() * norm, plan).to(head.dtype)
            for part in head.split(rows)
        ]
    )
