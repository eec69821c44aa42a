# SPDX-License-Identifier: Apache-2.0
"""The shapes, dtypes and inputs that the tests of all operations share."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows of activations: none, one, odd, more than the threads' split.
ROW_COUNTS = (0, 1, 3, 17, 137)

# Columns: below, at and beside the register widths (4, 8, 16 floats), then real hidden sizes.
COLUMN_COUNTS = (1, 3, 15, 16, 17, 64, 111, 576, 2050)

# Sizes of the Hadamard sign matrix that occur in real models.
SIGN_SIZES = (12, 20, 28, 36, 40, 44, 52, 60, 76, 108, 140, 148, 156, 172)

# Block sizes 2^m k: every path of the kernel (2^m below, at and above the register widths; radix 2,
# 4 and 8 remainders), head dimensions 64..256, the blocks of SmolLM2 and Llama.
HADAMARD_SIZES = (
    *(2**m for m in range(14)),
    *(12 * 2**m for m in range(9)),
    *(20, 80, 160, 112, 36 * 16, 76 * 64, 140 * 16, 156 * 4, 172 * 64),
)

# Blocks whose k part is a sum of integers (60 < k < 512).
INTEGER_SIZES = (76, 76 * 2, 108 * 8, 140 * 16, 172 * 64)

# [B, H, T, D] of keys and values.
KV_SHAPES = (
    (1, 1, 1, 64),
    (2, 3, 17, 64),
    (1, 2, 0, 64),
    (1, 8, 3, 128),
    (2, 1, 5, 96),
    (1, 2, 4, 80),
    (1, 1, 3, 256),
    (1, 2, 9, 14),  # no Hadamard
    (3, 2, 2, 2),
)


def outlier_rows(rows: int, columns: int, dtype: torch.dtype, factor: float = 1000.0) -> Tensor:
    """Normal activations in which every fourth row (row 0 first) is `factor` times larger."""
    x = torch.randn(rows, columns)
    x[::4] *= factor
    return x.to(dtype)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`outlier_rows` with NaN, infinities, zeros of both signs and the largest finite values."""
    x = outlier_rows(rows, columns, dtype)
    largest = torch.finfo(dtype).max
    values = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, largest, -largest)
    if x.numel():
        for i, value in enumerate(values):
            x.view(-1)[(i * 7 + 1) % x.numel()] = value
    return x


def edge_blocks(size: int, dtype: torch.dtype) -> Tensor:
    """Rows of one block: NaN, infinity, zeros of both signs, the largest finite values, an outlier
    of 1000, of 10^6, the smallest values of the dtype, one value, and normal ones."""
    x = torch.randn(9, size)
    x[2] = -0.0
    x[5, 3] = 1e6
    x[4, size // 2] = 1000.0
    x = x.to(dtype)
    x[0, 1], x[1, size - 1] = float("nan"), -float("inf")
    x[2, ::3] = 0.0
    info = torch.finfo(dtype)
    x[3, ::5], x[3, 1::5] = info.max / size, -info.max / size
    x[6] = (x[6].sign() * info.tiny).to(dtype)
    x[6, 2] = info.smallest_normal * info.eps
    x[7] = 0
    x[7, size // 3] = -3.25
    return x


def strided(x: Tensor) -> Tensor:
    """The values of x [.., R, C] as a view whose rows lie two row lengths apart."""
    return torch.cat((x, torch.full_like(x, float("nan"))), dim=-1)[..., : x.shape[-1]]


# ---- low-bit GEMM and attention over the quantized cache ----

# Outputs: below, at and beside the blocks of 16 and 32.
GEMM_OUTPUTS = (1, 15, 100, 576)

# Inputs (even): below and beside the groups of 8 and steps of 64, then real sizes.
GEMM_INPUTS = (2, 10, 64, 576, 1536, 11008)

# [B, Hq, Hkv, T, S]: decode and small T, key blocks of 32 full and not, more rows than a task has.
ATTENTION_SHAPES = (
    (1, 9, 3, 1, 100),
    (2, 8, 2, 7, 33),
    (2, 4, 4, 1, 1),
    (1, 6, 2, 40, 70),
    (1, 2, 1, 3, 0),
    (1, 2, 1, 5, 3),
    (3, 4, 1, 1, 64),
)

HEAD_DIMS = (2, 10, 64, 96, 128, 256)
