# SPDX-License-Identifier: Apache-2.0
"""Block Hadamard transforms of the last dimension, alone or fused with what surrounds R4."""

from torch import Tensor

from prefixquant.ops._library import define_on_every_device
from prefixquant.ops._rows import as_rows, launch, new_int8, new_row_scales


def _run_hadamard(x: Tensor, signs: Tensor | None, block_size: int) -> Tensor:
    y = x.new_empty(x.shape)
    launch("hadamard", x, x=as_rows(x), signs=signs, block_size=block_size, y=y)
    return y


def _run_hadamard_quantize(
    x: Tensor, signs: Tensor | None, block_size: int, scale: Tensor, bits: int
) -> Tensor:
    q = new_int8(x)
    launch(
        "hadamard_quantize",
        x,
        x=as_rows(x),
        signs=signs,
        block_size=block_size,
        scale=scale,
        bits=bits,
        q=q,
    )
    return q


def _run_swiglu_hadamard_quantize(
    gate: Tensor, up: Tensor, signs: Tensor | None, block_size: int, scale: Tensor, bits: int
) -> Tensor:
    q = new_int8(gate)
    launch(
        "swiglu_hadamard_quantize",
        gate,
        gate=as_rows(gate),
        up=as_rows(up),
        signs=signs,
        block_size=block_size,
        scale=scale,
        bits=bits,
        q=q,
    )
    return q


def _run_swiglu_hadamard_quantize_dynamic(
    gate: Tensor, up: Tensor, signs: Tensor | None, block_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    q, scale = new_int8(gate), new_row_scales(gate)
    launch(
        "swiglu_hadamard_quantize_dynamic",
        gate,
        gate=as_rows(gate),
        up=as_rows(up),
        signs=signs,
        block_size=block_size,
        bits=bits,
        q=q,
        scale=scale,
    )
    return q, scale


_hadamard = define_on_every_device(
    "hadamard(Tensor x, Tensor? signs, int block_size) -> Tensor",
    fake=lambda x, signs, block_size: x.new_empty(x.shape),
    run=_run_hadamard,
)
_hadamard_quantize = define_on_every_device(
    "hadamard_quantize(Tensor x, Tensor? signs, int block_size, Tensor scale, int bits) -> Tensor",
    fake=lambda x, signs, block_size, scale, bits: new_int8(x),
    run=_run_hadamard_quantize,
)
_swiglu_hadamard_quantize = define_on_every_device(
    "swiglu_hadamard_quantize(Tensor gate, Tensor up, Tensor? signs, int block_size, "
    "Tensor scale, int bits) -> Tensor",
    fake=lambda gate, up, signs, block_size, scale, bits: new_int8(gate),
    run=_run_swiglu_hadamard_quantize,
)
_swiglu_hadamard_quantize_dynamic = define_on_every_device(
    "swiglu_hadamard_quantize_dynamic(Tensor gate, Tensor up, Tensor? signs, int block_size, "
    "int bits) -> (Tensor q, Tensor scale)",
    fake=lambda gate, up, signs, block_size, bits: (new_int8(gate), new_row_scales(gate)),
    run=_run_swiglu_hadamard_quantize_dynamic,
)


def hadamard(x: Tensor, signs: Tensor | None, block_size: int) -> Tensor:
    """``y = (H_k (x) H_{2^m}) x / sqrt(2^m k)`` on each block of 2^m k in the last dimension.

    A block is read as [k, 2^m]: float32 butterflies over the 2^m part with distances 1, 2, 4, ...,
    then for each i the sum over j = 0..k-1 of ``t_j = signs[i, j] * x[j, :]``:

    - k <= 60 and k >= 512: ``(t_0 + t_1) + (t_2 + t_3)`` in groups of four and the groups from left
      to right, float32, then one multiplication.
    - 60 < k < 512: exact, of integers. With M the largest magnitude of the block after the
      butterflies and ``2^(e-1) <= M < 2^e``, e at least -90: ``X = rint(x * 2^(22-e))``, their
      signed sum S in int32, ``y = float32(S) * (2^(e-22) / sqrt(2^m k))``. An input is off by at
      most 2^-23 of 2^e, about as much as float32 rounds a sum of that size; the whole block is NaN
      where M is not finite.

    `prefixquant.hadamard.split_size` gives k and `hadamard_signs` the signs.

    Args:
        x: float32, bfloat16 or float16 [..., C], any strides; C a multiple of block_size.
        signs: int8 [k, k] of 1 and -1, 4 divides k; None for k = 1.
        block_size: 2^m k; 1 copies x.

    Returns:
        The dtype and shape of x, contiguous.

    Raises:
        ValueError: a wrong dtype, rank, size or sign.
    """
    return _hadamard(x, signs, block_size)


def hadamard_quantize(
    x: Tensor, signs: Tensor | None, block_size: int, scale: Tensor, bits: int
) -> Tensor:
    """``quantize_static(hadamard(float32(x)))``, the transform not rounded in between.

    Args:
        x, signs, block_size: as for `hadamard`.
        scale, bits: as for `quantize_static`.

    Returns:
        int8, the shape of x, contiguous.

    Raises:
        ValueError: a wrong dtype, rank, size, sign or ``bits``.
    """
    return _hadamard_quantize(x, signs, block_size, scale, bits)


def swiglu_hadamard_quantize(
    gate: Tensor, up: Tensor, signs: Tensor | None, block_size: int, scale: Tensor, bits: int
) -> Tensor:
    """``quantize_static(hadamard(silu(gate) * up))``, all in float32.

    ``silu(g) = g / (1 + exp(-g))`` with one fixed polynomial for exp (cpp/kernels/exp.h), the same
    on every instruction set.

    Args:
        gate: float32, bfloat16 or float16 [..., C], any strides: a half of a gate-up tensor is read
            in place.
        up: the dtype and shape of gate, any strides.
        signs, block_size: as for `hadamard`; block_size 1 leaves the transform out.
        scale, bits: as for `quantize_static`.

    Returns:
        int8, the shape of gate, contiguous.

    Raises:
        ValueError: a wrong dtype, rank, size, sign or ``bits``.
    """
    return _swiglu_hadamard_quantize(gate, up, signs, block_size, scale, bits)


def swiglu_hadamard_quantize_dynamic(
    gate: Tensor, up: Tensor, signs: Tensor | None, block_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """``quantize_dynamic(hadamard(silu(gate) * up))``, all in float32, one scale a row.

    Args:
        gate, up, signs, block_size: as for `swiglu_hadamard_quantize`.
        bits: 2 to 8.

    Returns:
        q int8, the shape of gate, contiguous; scale float32 [rows], rows = gate.numel() / C.

    Raises:
        ValueError: a wrong dtype, rank, size, sign or ``bits``.
    """
    return _swiglu_hadamard_quantize_dynamic(gate, up, signs, block_size, bits)
