# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementations of ``ops/gemm.py`` and ``ops/gemm_fused.py``.

A prepacked weight is uint8 [ceil(N/64), padded K / (64 or 32), 2048]: fragment blocks of 64 rows x
64 k (4-bit) or 32 k (8-bit), K padded to 128; ``cuda/include/prefixquant/layout_w4.h`` has the
layout. Weights count as constants: they may be prefetched while the kernel before is still running,
so they must not be written by it.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from prefixquant import _C
from prefixquant.ops import gemm
from prefixquant.ops._library import implement, on_device, stream_of

_K_PER_BLOCK = {4: 64, 8: 32}
# bits of the weight and of the activations of each operation
_OPERATIONS = {"gemm_w4a4": (4, 4), "gemm_w4a8": (4, 8), "gemm_w8a8": (8, 8)}

_COUNTER_BYTES = 16384  # kGemmW4CounterBytes: zero between launches, whatever the config

# (device, stream) -> (graph capture or 0, partial sums of split tiles)
_workspaces: dict[tuple[int, int], tuple[int, Tensor]] = {}


def _prepacked_shape(bits: int, n: int, k: int) -> tuple[int, ...]:
    padded_k = -(-k // 128) * 128
    return (-(-n // 64), padded_k // _K_PER_BLOCK[bits], 2048)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, int, int], bits: tuple[int, int], device: int) -> tuple[list[int], int]:
    """Config of a launch and the bytes of workspace it needs."""
    m, n, k = sizes
    return _C.gemm_plan_cuda(
        m=m, n=n, k=k, weight_bits=bits[0], activation_bits=bits[1], device=device
    )


def _workspace(needed: int, device: torch.device, stream: int) -> Tensor | None:
    """Scratch of a launch: one a stream, and one a graph in that graph's memory pool."""
    if needed == 0:
        return None
    capture = 0
    if torch.cuda.is_current_stream_capturing():
        capture = _C.capture_id_cuda(stream=stream)
    key = (device.index, stream)
    owner, kept = _workspaces.get(key, (0, None))
    if kept is None or owner != capture or kept.numel() < needed:
        kept = torch.empty(needed, dtype=torch.uint8, device=device)
        kept[:_COUNTER_BYTES].zero_()
        _workspaces[key] = (capture, kept)
    return kept


def _prepack(bits: int) -> Callable[[Tensor], Tensor]:
    def prepack(weight: Tensor) -> Tensor:
        weight = weight.contiguous()
        columns = weight.shape[-1] * (8 // bits) if weight.dim() else 0
        rows = weight.shape[0] if weight.dim() else 0
        prepacked = weight.new_empty(_prepacked_shape(bits, rows, columns), dtype=torch.uint8)
        with on_device(weight):
            _C.prepack_cuda(weight=weight, bits=bits, prepacked=prepacked, stream=stream_of(weight))
        return prepacked

    return prepack


def _unprepack(bits: int) -> Callable[[Tensor, int, int], Tensor]:
    def unprepack(prepacked: Tensor, n: int, k: int) -> Tensor:
        gemm._check_sizes(f"unprepack_w{bits}", n, k, even_k=bits == 4)
        shape, dtype = ((n, k // 2), torch.uint8) if bits == 4 else ((n, k), torch.int8)
        weight = prepacked.new_empty(shape, dtype=dtype)
        with on_device(prepacked):
            _C.unprepack_cuda(
                prepacked=prepacked.contiguous(), bits=bits, weight=weight, stream=stream_of(weight)
            )
        return weight

    return unprepack


def _aligned_rows(x: Tensor) -> Tensor:
    """x [M, K] with contiguous rows whose starts are multiples of 16 bytes apart."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    if x.shape[0] > 1 and (x.stride(0) % 16 or x.stride(0) < x.shape[1]):
        padded = x.new_empty((x.shape[0], -(-x.shape[1] // 16) * 16))
        padded = padded[:, : x.shape[1]]
        padded.copy_(x)
        return padded
    return x


def launch_gemm(  # noqa: PLR0913
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    *,
    bits: tuple[int, int] = (4, 8),
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
    output_bits: int = 8,
    swiglu: bool = False,
    out_dtype: torch.dtype = torch.float16,
    config: list[int] | None = None,
) -> Tensor:
    """One launch of the CUDA GEMM on x int8 [M, K]; ``config`` overrides the chosen kernel."""
    if x.device.type != "cuda":
        raise ValueError(f"gemm_w{bits[0]}: x: expected a tensor on a CUDA device, got {x.device}")
    channels = weight_scale.shape[0] if weight_scale.dim() else 0
    tokens, width = x.shape if x.dim() == 2 else (0, 0)
    y = x.new_empty(
        (tokens, channels // 2 if swiglu else channels),
        dtype=out_dtype if output_scale is None else torch.int8,
    )
    if x.dim() == 2:
        x = _aligned_rows(x)
    with on_device(x):
        stream = stream_of(x)
        needed = 0
        if config is None:
            config, needed = _plan((tokens, channels, width), bits, x.device.index)
        else:
            needed = _C.gemm_workspace_cuda(
                m=tokens, n=channels, k=width, weight_bits=bits[0], config=config
            )
        _C.gemm_cuda(
            x=x,
            weight=weight,
            weight_bits=bits[0],
            weight_scale=weight_scale,
            input_scale=input_scale,
            bias=bias,
            residual=residual,
            output_scale=output_scale,
            rounding=_dtype_name(out_dtype),
            output_bits=output_bits,
            swiglu=swiglu,
            y=y,
            workspace=_workspace(needed, x.device, stream),
            config=config,
            stream=stream,
        )
    return y


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() not in (0, 2) else x


def _gemm(bits: tuple[int, int]) -> Callable[..., Tensor]:
    def run(*arguments) -> Tensor:
        a = gemm.GemmArguments(*arguments)
        options = a._replace(x=_as_matrix(a.x))._asdict()
        y = launch_gemm(**options, bits=bits)
        return y.view(*a.x.shape[:-1], y.shape[-1])

    return run


def _fused(  # noqa: PLR0913
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output_scale: Tensor | None,
    bits: list[int],
    swiglu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    y = launch_gemm(
        _as_matrix(x),
        weight,
        weight_scale,
        input_scale,
        bits=(bits[0], bits[1]),
        bias=bias,
        residual=None if residual is None else _as_matrix(residual),
        output_scale=output_scale,
        output_bits=bits[2],
        swiglu=swiglu,
        out_dtype=out_dtype,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


gemm.PREPACKED_SHAPES["cuda"] = _prepacked_shape
for _bits in (4, 8):
    implement(f"prepack_w{_bits}", _prepack(_bits))
    implement(f"unprepack_w{_bits}", _unprepack(_bits))
for _name, _operation_bits in _OPERATIONS.items():
    implement(_name, _gemm(_operation_bits))
implement("gemm_fused", _fused)
