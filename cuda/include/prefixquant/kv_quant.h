// SPDX-License-Identifier: Apache-2.0
//
// Rows [B, H, T, D] of floats <-> rows of a KV cache on the GPU: host interface.
//
//   quantize:   q = clamp(rint((R x - shift[h]) * (1 / scale[h])))   R a Hadamard over D or
//               nothing, shift 0 where it is absent
//   dequantize: y = round(float(q) * scale[h])          16-bit caches: y = the row itself
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "prefixquant/kv_attention.h"

namespace prefixquant {

// Arguments of one launch. Device pointers; the last dimension is contiguous everywhere.
struct KvRowsParams {
  void* x = nullptr;                    // the floats: read by quantize, written by dequantize
  KvDtype x_dtype = KvDtype::kFloat16;  // float16, bfloat16 or float32
  int64_t x_strides[3] = {};            // of b, h, t, in elements

  uint8_t* cache = nullptr;  // int4 (low nibble = even channel), int8 or, to dequantize, x_dtype
  KvDtype cache_dtype = KvDtype::kInt4;
  int64_t cache_strides[3] = {};  // of b (or page), h, t, in bytes
  const float* scale = nullptr;   // [H], not read at 16 bits

  // dequantize: row t of b is row t % page_size of page block_table[b * stride + t / page_size];
  // nullptr: row t of page b.
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int page_size = 1;

  const int8_t* signs = nullptr;  // quantize: the k part of the Hadamard, [sign_size, sign_size]
  int sign_size = 1;
  int rotation_size = 1;         // D, or 1: none
  const float* shift = nullptr;  // quantize: [H, D] or nullptr

  int batch = 0;
  int heads = 0;
  int tokens = 0;
  int dim = 0;
};

// Asynchronous on `stream`; usable in a CUDA graph. quantize takes any even D of at most 1024.
void launch_kv_quantize(const KvRowsParams& params, cudaStream_t stream);
void launch_kv_dequantize(const KvRowsParams& params, cudaStream_t stream);

}  // namespace prefixquant
