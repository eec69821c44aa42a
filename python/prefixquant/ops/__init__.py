# SPDX-License-Identifier: Apache-2.0
"""The quantized operations, each registered as ``torch.ops.prefixquant.<name>``."""

from prefixquant import _C
from prefixquant.ops.compand import compand_
from prefixquant.ops.gemm import (
    gemm_w4a4,
    gemm_w4a8,
    gemm_w8a8,
    prepack_w4,
    prepack_w8,
    unprepack_w4,
    unprepack_w8,
)
from prefixquant.ops.gemm_fused import gemm_fused
from prefixquant.ops.hadamard import (
    hadamard,
    hadamard_quantize,
    swiglu_hadamard_quantize,
    swiglu_hadamard_quantize_dynamic,
)
from prefixquant.ops.kv_attention import kv_attention
from prefixquant.ops.kv_decode_attention import kv_decode_attention
from prefixquant.ops.kv_prefill_attention import kv_prefill_attention
from prefixquant.ops.kv_quant import kv_append, kv_dequantize, kv_quantize
from prefixquant.ops.outlier_scan import outlier_scan
from prefixquant.ops.pack_int4 import pack_int4, unpack_int4
from prefixquant.ops.quantize import quantize_static
from prefixquant.ops.quantize_dynamic import quantize_digits, quantize_dynamic
from prefixquant.ops.rmsnorm_hadamard import rmsnorm_hadamard_quantize
from prefixquant.ops.rmsnorm_quant import (
    add_rmsnorm_quantize,
    rmsnorm,
    rmsnorm_quantize,
    rmsnorm_quantize_dynamic,
)
from prefixquant.ops.rope_kv_append import rope_kv_append

__all__ = [
    "add_rmsnorm_quantize",
    "compand_",
    "gemm_fused",
    "gemm_w4a4",
    "gemm_w4a8",
    "gemm_w8a8",
    "hadamard",
    "hadamard_quantize",
    "kv_append",
    "kv_attention",
    "kv_decode_attention",
    "kv_dequantize",
    "kv_prefill_attention",
    "kv_quantize",
    "outlier_scan",
    "pack_int4",
    "prepack_w4",
    "prepack_w8",
    "quantize_digits",
    "quantize_dynamic",
    "quantize_static",
    "rmsnorm",
    "rmsnorm_hadamard_quantize",
    "rmsnorm_quantize",
    "rmsnorm_quantize_dynamic",
    "rope_kv_append",
    "swiglu_hadamard_quantize",
    "swiglu_hadamard_quantize_dynamic",
    "unpack_int4",
    "unprepack_w4",
    "unprepack_w8",
]

if _C.with_cuda:
    from prefixquant.ops import gemm_cuda as _gemm_cuda  # noqa: F401
    from prefixquant.ops import kv_attention_cuda as _kv_attention_cuda  # noqa: F401
    from prefixquant.ops import kv_prefill_attention_cuda as _kv_prefill_attention_cuda  # noqa: F401
    from prefixquant.ops import kv_quant_cuda as _kv_quant_cuda  # noqa: F401
