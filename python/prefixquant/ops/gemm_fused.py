# SPDX-License-Identifier: Apache-2.0
"""A GEMM with what follows it in a decoder layer. The GPU kernels fuse it; the CPU composes it."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefixquant.ops import gemm
from prefixquant.ops._library import define


class FusedArguments(NamedTuple):
    """The arguments of the operation, in the order of its schema."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    output_scale: Tensor | None
    bits: list[int]
    swiglu: bool
    out_dtype: torch.dtype


def _fused_fake(*arguments) -> Tensor:
    a = FusedArguments(*arguments)
    channels = a.weight_scale.shape[0] // 2 if a.swiglu else a.weight_scale.shape[0]
    dtype = a.out_dtype if a.output_scale is None else torch.int8
    return a.x.new_empty((*a.x.shape[:-1], channels), dtype=dtype)


def _fused_cpu(*arguments) -> Tensor:
    # The composition that the fused kernels must equal: each step on the values rounded so far.
    a = FusedArguments(*arguments)
    product = gemm.gemm_w4a8 if a.bits[0] == 4 else gemm.gemm_w8a8
    y = product(a.x, a.weight, a.weight_scale, a.input_scale, a.bias, a.out_dtype)
    if a.swiglu:
        gate, up = y[..., ::2].float(), y[..., 1::2].float()
        y = (torch.nn.functional.silu(gate) * up).to(a.out_dtype)
    if a.residual is not None:
        y = (y.float() + a.residual.float()).to(a.out_dtype)
    if a.output_scale is not None:
        limit = 2 ** (a.bits[2] - 1)
        q = torch.round(y.float() * (1.0 / a.output_scale.float()))
        y = q.clamp(-limit, limit - 1).to(torch.int8)
    return y


_gemm_fused = define(
    "gemm_fused(Tensor x, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias,"
    " Tensor? residual, Tensor? output_scale, int[] bits, bool swiglu, ScalarType out_dtype)"
    " -> Tensor",
    fake=_fused_fake,
    cpu=_fused_cpu,
)


def gemm_fused(  # noqa: PLR0913
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
    bits: tuple[int, int, int] = (4, 8, 8),
    swiglu: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`gemm_w4a8` with what follows it: ``quantize(swiglu(y) + residual)``, each step rounded.

    ::

        y = round(float(acc) * (input_scale * weight_scale) (+ bias))         to out_dtype
        y[.., i] = round(silu(y[.., 2i]) * y[.., 2i + 1])                     with swiglu
        y = round(y + residual)                                               with residual
        q = clamp(rint(y * (1 / output_scale)))                               with output_scale

    Args:
        x: int8 [..., K].
        weight: [N, K] as `prepack_w4` or `prepack_w8` returned it; with swiglu its rows alternate
            between gate and up.
        weight_scale: float32 [N].
        input_scale: float32, one element.
        bias: float32, bfloat16 or float16 [N].
        residual: [..., N_out] of ``out_dtype``; N_out = N / 2 with swiglu, else N.
        output_scale: float32, one element; the result is then int8.
        bits: of the weight (4 or 8), of the activations (4 promises x in [-8, 7]) and of the
            quantized result (4 or 8).
        swiglu: gate and up rows are interleaved.
        out_dtype: bfloat16 or float16 (also float32 or int32 where nothing is fused).

    Returns:
        [..., N_out] of ``out_dtype``, or int8.

    Raises:
        ValueError: wrong dtype, device or shape; the message names the argument.
    """
    return _gemm_fused(
        x, weight, weight_scale, input_scale, bias, residual, output_scale, bits, swiglu, out_dtype
    )
