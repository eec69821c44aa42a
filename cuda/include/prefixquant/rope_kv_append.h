// SPDX-License-Identifier: Apache-2.0
//
// Between projection and attention on the GPU: host interface.
//
// Computes, for every token t and head of q and k, in float32, each operation rounded on its own:
//   y = (x * rstd) * weight            optional RMSNorm; rstd = float(1 / sqrt(mean(x^2) + eps))
//   y = y * cos[p] + (-y[D/2:], y[:D/2]) * sin[p]      p = positions[t]
//   y = R3 y                                           optional Hadamard over D
// q is rounded to its dtype; k less its shift (optional) and v (as projected) become
// clamp(rint(y * (1 / scale[head]))) or are rounded, and go to row slots[t] of the cache; slots
// below 0 are not written.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "prefixquant/kv_attention.h"

namespace prefixquant {

// Arguments of one launch. Device pointers; strides in elements unless said otherwise.
struct RopeKvAppendParams {
  const void* qkv = nullptr;          // [T, (Hq + 2 Hkv) * D]
  KvDtype dtype = KvDtype::kFloat16;  // of qkv and q: float16, bfloat16 or float32
  int64_t qkv_stride = 0;

  const float* cos = nullptr;  // [positions, D]
  const float* sin = nullptr;
  const int32_t* positions = nullptr;  // [T]
  const void* q_norm = nullptr;        // [D] or nullptr
  const void* k_norm = nullptr;
  KvDtype norm_dtype = KvDtype::kFloat16;
  double eps = 0.0;

  const int8_t* signs = nullptr;  // [sign_size, sign_size] or nullptr: the k part of R3
  int sign_size = 1;
  int rotation_size = 1;  // D, or 1: no rotation

  const float* k_shift = nullptr;  // [Hkv, D] or nullptr
  const float* k_scale = nullptr;  // [Hkv], nullptr at 16 bits
  const float* v_scale = nullptr;
  KvDtype cache_dtype = KvDtype::kInt4;
  void* k_cache = nullptr;
  void* v_cache = nullptr;
  int64_t k_strides[3] = {};  // bytes from page to page, head to head, row to row
  int64_t v_strides[3] = {};
  int page_size = 1;
  const int64_t* slots = nullptr;  // [T]

  void* q = nullptr;  // [T, Hq, D] contiguous

  int tokens = 0;
  int heads = 0;
  int kv_heads = 0;
  int dim = 0;
};

// D is even, at most 1024. Asynchronous on `stream`; usable in a CUDA graph.
void launch_rope_kv_append(const RopeKvAppendParams& params, const DeviceInfo& device,
                           cudaStream_t stream);

}  // namespace prefixquant
