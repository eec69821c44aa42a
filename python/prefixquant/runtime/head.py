# SPDX-License-Identifier: Apache-2.0
"""The ``lm_head``: 16-bit weights, or 8-bit weights with 16-bit activations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import ops
from prefixquant.dtypes import head_weight
from prefixquant.errors import UserError

# Rows of the vocabulary that are quantized at a time: the 16-bit weight stays off the device.
_ROWS_AT_ONCE = 16384


@dataclass(frozen=True)
class Head16:
    """``logits = x @ W^T``, float32 [T, V]."""

    weight: Tensor  # 16-bit [V, C]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
            # float32 sums as they are: not rounded to 16 bits in between, and no conversion.
            arguments = (x, self.weight.T, torch.float32)
            if out is None:
                return torch.ops.aten.mm.dtype(*arguments)
            return torch.ops.aten.mm.dtype_out(*arguments, out=out)
        if len(x) == 1 and x.device.type == "cpu":
            # torch's matrix-vector product reads the weight 2.6 times as fast there.
            logits = (self.weight @ x[0])[None]
        else:
            logits = F.linear(x, self.weight)
        return logits.float() if out is None else out.copy_(logits)


@dataclass(frozen=True)
class Head8:
    """``logits = x @ (scale * W8)^T``, float32 [T, V], W8 int8 with one scale a row.

    x is split into two int8 digits, each with a scale a row: 15 bits of x on the int8 kernels. Both
    digits are rows of one product, so the weight is read once.
    """

    weight: Tensor  # as `prepack_w8` returned it
    scale: Tensor  # float32 [V]
    one: Tensor  # float32 [], the input scale of the integer product

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        digits, scales = ops.quantize_digits(x)
        sums = ops.gemm_w8a8(digits, self.weight, self.scale, self.one, None, torch.float32)
        high, low = sums.chunk(2)
        high_scale, low_scale = scales[:, None].chunk(2)
        return torch.addcmul(torch.mul(high, high_scale, out=out), low, low_scale, out=out)


Head = Head16 | Head8


def make_head(weight: Tensor, bits: int, device: torch.device) -> Head:
    """The head of a 16-bit weight [V, C] that lies on the host.

    Raises:
        UserError: ``bits`` is neither 8 nor 16.
    """
    if bits == 16:
        return Head16(head_weight(weight, device))
    if bits != 8:
        raise UserError(f"head_bits: expected 8 or 16, got {bits}")
    q = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), device=device)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        q[rows], scale[rows] = ops.quantize_dynamic(weight[rows].to(device), 8)
    return head_of_levels(q, scale)


def head_of_levels(levels: Tensor, scale: Tensor) -> Head8:
    """The head of int8 weights [V, C] with a scale float32 [V] a row."""
    return Head8(ops.prepack_w8(levels), scale, torch.ones((), device=levels.device))
