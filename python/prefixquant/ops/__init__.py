# SPDX-License-Identifier: Apache-2.0
"""The quantized operations, each registered as ``torch.ops.prefixquant.<name>``."""

from prefixquant.ops.gemm import (
    gemm_w4a4,
    gemm_w4a8,
    gemm_w8a8,
    prepack_w4,
    prepack_w8,
    unprepack_w4,
    unprepack_w8,
)
from prefixquant.ops.pack_int4 import pack_int4, unpack_int4

__all__ = [
    "gemm_w4a4",
    "gemm_w4a8",
    "gemm_w8a8",
    "pack_int4",
    "prepack_w4",
    "prepack_w8",
    "unpack_int4",
    "unprepack_w4",
    "unprepack_w8",
]
