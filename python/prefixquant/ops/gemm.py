# SPDX-License-Identifier: Apache-2.0
"""Matrix products of int8 activations with prepacked 4-bit or 8-bit weights.

The CUDA implementations are registered by their own module: ``_library.implement`` adds them to the
operations defined here, and ``PREPACKED_SHAPES`` learns the shape of the CUDA kernel layout.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops._library import define

# device type -> (bits, n, k) -> shape of the prepacked weight. CPU: cpp/gemm_params.h.
PREPACKED_SHAPES: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "cpu": lambda bits, n, k: (-(-n // 16), -(-k // 64) * 8, 16 * bits),
}


def _empty_prepacked(like: Tensor, bits: int, n: int, k: int) -> Tensor:
    return like.new_empty(PREPACKED_SHAPES[like.device.type](bits, n, k), dtype=torch.uint8)


def _last(t: Tensor) -> int:
    return t.shape[-1] if t.dim() else 0  # 0-dim and 1-dim are refused by the C++ checks


def _first(t: Tensor) -> int:
    return t.shape[0] if t.dim() else 0


def _prepack_w4_fake(weight_packed: Tensor) -> Tensor:
    return _empty_prepacked(weight_packed, 4, _first(weight_packed), 2 * _last(weight_packed))


def _prepack_w4_cpu(weight_packed: Tensor) -> Tensor:
    prepacked = _prepack_w4_fake(weight_packed)
    _C.prepack_w4(weight_packed=weight_packed.contiguous(), prepacked=prepacked)
    return prepacked


def _prepack_w8_fake(weight: Tensor) -> Tensor:
    return _empty_prepacked(weight, 8, _first(weight), _last(weight))


def _prepack_w8_cpu(weight: Tensor) -> Tensor:
    prepacked = _prepack_w8_fake(weight)
    _C.prepack_w8(weight=weight.contiguous(), prepacked=prepacked)
    return prepacked


def _unprepack_w4_fake(prepacked: Tensor, n: int, k: int) -> Tensor:
    return prepacked.new_empty((n, k // 2), dtype=torch.uint8)


def _check_sizes(op: str, n: int, k: int, even_k: bool) -> None:
    # n and k are no tensors: C++ would see them only as the shape of the output.
    if n < 0:
        raise ValueError(f"{op}: n: expected at least 0, got {n}")
    if k < 0 or (even_k and k % 2):
        raise ValueError(f"{op}: k: expected {'an even' if even_k else 'a'} size >= 0, got {k}")


def _unprepack_w4_cpu(prepacked: Tensor, n: int, k: int) -> Tensor:
    _check_sizes("unprepack_w4", n, k, even_k=True)
    weight_packed = _unprepack_w4_fake(prepacked, n, k)
    _C.unprepack_w4(prepacked=prepacked.contiguous(), weight_packed=weight_packed)
    return weight_packed


def _unprepack_w8_fake(prepacked: Tensor, n: int, k: int) -> Tensor:
    return prepacked.new_empty((n, k), dtype=torch.int8)


def _unprepack_w8_cpu(prepacked: Tensor, n: int, k: int) -> Tensor:
    _check_sizes("unprepack_w8", n, k, even_k=False)
    weight = _unprepack_w8_fake(prepacked, n, k)
    _C.unprepack_w8(prepacked=prepacked.contiguous(), weight=weight)
    return weight


class GemmArguments(NamedTuple):
    """The arguments of the three GEMM operations, in the order of `_GEMM_ARGUMENTS`."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype


def _gemm_fake(*arguments) -> Tensor:
    a = GemmArguments(*arguments)
    return a.x.new_empty((*a.x.shape[:-1], _first(a.weight_scale)), dtype=a.out_dtype)


def _gemm_cpu(kernel: Callable) -> Callable[..., Tensor]:
    def gemm(*arguments) -> Tensor:
        a = GemmArguments(*arguments)
        x = a.x.contiguous()
        y = _gemm_fake(*arguments)
        rows = math.prod(x.shape[:-1])
        kernel(
            x=x.view(rows, _last(x)) if x.dim() else x,
            weight=a.weight,
            weight_scale=a.weight_scale,
            input_scale=a.input_scale,
            bias=a.bias,
            y=y.view(rows, _first(a.weight_scale)),
        )
        return y

    return gemm


_GEMM_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor"
)

_prepack_w4 = define(
    "prepack_w4(Tensor weight_packed) -> Tensor", fake=_prepack_w4_fake, cpu=_prepack_w4_cpu
)
_unprepack_w4 = define(
    "unprepack_w4(Tensor prepacked, int n, int k) -> Tensor",
    fake=_unprepack_w4_fake,
    cpu=_unprepack_w4_cpu,
)
_prepack_w8 = define(
    "prepack_w8(Tensor weight) -> Tensor", fake=_prepack_w8_fake, cpu=_prepack_w8_cpu
)
_unprepack_w8 = define(
    "unprepack_w8(Tensor prepacked, int n, int k) -> Tensor",
    fake=_unprepack_w8_fake,
    cpu=_unprepack_w8_cpu,
)


def prepack_w4(weight_packed: Tensor) -> Tensor:
    """Reorders a packed int4 weight into the layout that the GEMM kernels of its device read.

    Args:
        weight_packed: uint8 [N, K/2], two values a byte, low nibble = even k, two's complement.

    Returns:
        uint8, for the CPU [ceil(N/16), ceil(K/64) * 8, 64], described in ``cpp/gemm_params.h``.

    Raises:
        ValueError: wrong dtype or rank.
    """
    return _prepack_w4(weight_packed)


def unprepack_w4(prepacked: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `prepack_w4`: the packed weight uint8 [n, k/2].

    Raises:
        ValueError: wrong dtype, odd or negative size, or a shape that is not that of [n, k].
    """
    return _unprepack_w4(prepacked, n, k)


def prepack_w8(weight: Tensor) -> Tensor:
    """Reorders an int8 weight [N, K] into the layout that the GEMM kernels of its device read.

    Returns:
        uint8, for the CPU [ceil(N/16), ceil(K/64) * 8, 128], described in ``cpp/gemm_params.h``.

    Raises:
        ValueError: wrong dtype or rank.
    """
    return _prepack_w8(weight)


def unprepack_w8(prepacked: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `prepack_w8`: the weight int8 [n, k].

    Raises:
        ValueError: wrong dtype, negative size, or a shape that is not that of [n, k].
    """
    return _unprepack_w8(prepacked, n, k)


def _define_gemm(name: str, kernel: Callable, documentation: str) -> Callable[..., Tensor]:
    operation = define(name + _GEMM_ARGUMENTS, fake=_gemm_fake, cpu=_gemm_cpu(kernel))

    def gemm(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return operation(x, weight, weight_scale, input_scale, bias, out_dtype)

    gemm.__name__ = gemm.__qualname__ = name
    gemm.__doc__ = documentation
    return gemm


gemm_w4a8 = _define_gemm(
    "gemm_w4a8",
    _C.gemm_w4,
    """``y[m, n] = float(sum_k x[m, k] w[n, k]) * (input_scale * weight_scale[n]) (+ bias[n])``.

    The sum is exact in int32; each float32 operation is rounded on its own (no fused multiply-add),
    then y is rounded to ``out_dtype``. ``torch.int32`` returns the sums themselves.

    Args:
        x: int8 [..., K], K even.
        weight: the int4 weight [N, K] as `prepack_w4` returned it.
        weight_scale: float32 [N], one scale per output channel.
        input_scale: float32, one element, on the device of x.
        bias: float32, bfloat16 or float16 [N], added in float32.
        out_dtype: float32, bfloat16, float16 or int32.

    Returns:
        [..., N] of ``out_dtype``.

    Raises:
        ValueError: wrong dtype, device or shape; the message names the argument.
    """,
)
# Activations are int8 containers in either case, so on the CPU W4A4 and W4A8 are one kernel.
gemm_w4a4 = _define_gemm(
    "gemm_w4a4",
    _C.gemm_w4,
    """`gemm_w4a8` for activations in [-8, 7] (int8 containers), which some devices multiply faster.

    On the CPU it is the same kernel, and larger values of x still give the exact result.
    """,
)
gemm_w8a8 = _define_gemm(
    "gemm_w8a8",
    _C.gemm_w8,
    """`gemm_w4a8` for an int8 weight [N, K] as `prepack_w8` returned it; K may be odd.""",
)
