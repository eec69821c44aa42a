# SPDX-License-Identifier: Apache-2.0
"""Weights as a checkpoint holds them: packed integers, scales, and 16-bit outliers.

A row of b-bit weights is a little-endian bit string: weight k is its bits b k .. b k + b - 1, in
two's complement (docs/checkpoint-format.md, "Values"). For 4 bits that is `ops.pack_int4`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from prefixquant.quantizer import qrange
from prefixquant.solvers.weight import Outliers, QuantizedWeight

# What a linear's tensors are called after its name.
PACKED, SCALE, OUTLIER_INDEX, OUTLIER_VALUE = (
    "weight_packed",
    "weight_scale",
    "outlier_index",
    "outlier_value",
)


def values_per_unit(bits: int) -> int:
    """The fewest values that fill whole bytes: 4 of 2 bits, 8 of 3 bits, 2 of 4 bits."""
    return 8 // math.gcd(8, bits)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row; ``columns`` is a multiple of `values_per_unit`."""
    return columns * bits // 8


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """int8 [..., K] with values in the range of ``bits`` -> uint8 [..., K * bits / 8].

    Raises:
        ValueError: K does not fill whole bytes, a wrong dtype, or a value out of range.
    """
    unit, (qmin, qmax) = values_per_unit(bits), qrange(bits)
    if q.dtype != torch.int8:
        raise ValueError(f"pack_bits: q expected int8, got {q.dtype}")
    if q.shape[-1] % unit:
        raise ValueError(
            f"pack_bits: q expected a multiple of {unit} columns at {bits} bits, got {q.shape[-1]}"
        )
    if q.numel() and (q.min() < qmin or q.max() > qmax):
        raise ValueError(
            f"pack_bits: q expected values from {qmin} to {qmax}, "
            f"got {q.min().item()} to {q.max().item()}"
        )
    fields = (q.to(torch.int32) & (1 << bits) - 1).unflatten(-1, (-1, unit))
    shifts = bits * torch.arange(unit, dtype=torch.int32, device=q.device)
    words = (fields << shifts).sum(dim=-1, dtype=torch.int32)  # 8 to 24 bits
    offsets = 8 * torch.arange(unit * bits // 8, dtype=torch.int32, device=q.device)
    return ((words[..., None] >> offsets) & 255).to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., K * bits / 8] -> int8 [..., K]."""
    unit = values_per_unit(bits)
    length = unit * bits // 8
    offsets = 8 * torch.arange(length, dtype=torch.int32, device=packed.device)
    words = (packed.unflatten(-1, (-1, length)).to(torch.int32) << offsets).sum(
        dim=-1, dtype=torch.int32
    )
    shifts = bits * torch.arange(unit, dtype=torch.int32, device=packed.device)
    fields = (words[..., None] >> shifts) & (1 << bits) - 1
    sign = 1 << (bits - 1)
    return ((fields ^ sign) - sign).to(torch.int8).flatten(-2)


def pack_weight(solved: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear's weight, by the last part of their name.

    Args:
        dtype: the 16-bit dtype of outliers.
    """
    tensors = {
        PACKED: solved.q if solved.bits == 8 else pack_bits(solved.q, solved.bits),
        SCALE: solved.scale.float(),
    }
    if solved.outliers is not None:
        tensors[OUTLIER_INDEX] = solved.outliers.index.to(torch.int32)
        tensors[OUTLIER_VALUE] = solved.outliers.value.to(dtype)
    return tensors


def unpack_weight(tensors: Mapping[str, Tensor], linear: str, bits: int) -> QuantizedWeight:
    """The weight of the linear of that full name, out of a checkpoint's tensors."""
    packed = tensors[f"{linear}.{PACKED}"]
    outliers = None
    if f"{linear}.{OUTLIER_INDEX}" in tensors:
        index = tensors[f"{linear}.{OUTLIER_INDEX}"].long()
        outliers = Outliers(index, tensors[f"{linear}.{OUTLIER_VALUE}"].float())
    q = packed if bits == 8 else unpack_bits(packed, bits)
    return QuantizedWeight(q, tensors[f"{linear}.{SCALE}"].float(), bits, outliers)
