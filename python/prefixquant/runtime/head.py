# SPDX-License-Identifier: Apache-2.0
"""The ``lm_head``: 16-bit weights, or 8-bit weights with 16-bit activations."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixquant import ops
from prefixquant.errors import UserError

# Rows of the vocabulary that are quantized at a time: the 16-bit weight stays off the device.
_ROWS_AT_ONCE = 16384
_DIGIT = 256  # x = (256 high + low) * scale with high and low in int8


@dataclass(frozen=True)
class Head16:
    """``logits = x @ W^T``, float32 [T, V]."""

    weight: Tensor  # 16-bit [V, C]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if len(x) == 1 and x.device.type == "cpu":
            # torch's matrix-vector product reads the weight 2.6 times as fast there.
            return (self.weight @ x[0])[None].float()
        return F.linear(x, self.weight).float()


@dataclass(frozen=True)
class Head8:
    """``logits = x @ (scale * W8)^T``, float32 [T, V], W8 int8 with one scale a row.

    x is split into two int8 digits, x = s (256 high + low): 16 bits of x on the int8 kernels. Both
    digits are rows of one product, so the weight is read once.
    """

    weight: Tensor  # as `prepack_w8` returned it
    scale: Tensor  # float32 [V]
    one: Tensor  # float32 [], the input scale of the integer product

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        # 127.49 * 256: the largest value still rounds to a high digit of 127.
        step = (x.abs().amax(dim=-1, keepdim=True) / (127.49 * _DIGIT)).clamp_min(1e-30)
        digits = (x / step).round()
        high = (digits / _DIGIT).round()
        low = digits - high * _DIGIT  # -128 .. 128
        both = torch.cat((high, low.clamp_max(127))).to(torch.int8)
        sums = ops.gemm_w8a8(both, self.weight, self.scale, self.one, None, torch.float32)
        high_sum, low_sum = sums.chunk(2)
        return (high_sum * _DIGIT + low_sum) * step


Head = Head16 | Head8


def make_head(weight: Tensor, bits: int, device: torch.device) -> Head:
    """The head of a 16-bit weight [V, C] that lies on the host.

    Raises:
        UserError: ``bits`` is neither 8 nor 16.
    """
    if bits == 16:
        # CPUs multiply float16 slowly, or not at all.
        return Head16(weight.to(torch.bfloat16) if device.type == "cpu" else weight.to(device))
    if bits != 8:
        raise UserError(f"head_bits: expected 8 or 16, got {bits}")
    quantized = [_quantize_rows(rows.to(device)) for rows in weight.split(_ROWS_AT_ONCE)]
    q = torch.cat([rows for rows, _ in quantized])
    scale = torch.cat([scales for _, scales in quantized])
    return Head8(ops.prepack_w8(q), scale, torch.ones((), device=device))


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = ops.quantize_dynamic(rows, 8)
    return q, scale.view(-1)
