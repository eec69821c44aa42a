// SPDX-License-Identifier: Apache-2.0
//
// Attention of few query tokens over [16-bit prefix | KV cache] on the GPU: host interface.
//
// Computes, for each sequence b, query token i and query head h (KV head h / group), in float32:
//   s[j] = scaling * (q . prefix_k[j])            prefix, always attended
//   s[j] = scaling * k_scale * (q . k[j])         rows of the cache that the query may see
//   out  = softmax(s) . [prefix_v | v_scale * v]  zeros where nothing is attended
// optionally rounded to q's dtype and quantized: clamp(rint(out * (1 / output_scale))).
// The cache holds int4 (low nibble = even channel), int8 or 16-bit rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "prefixquant/device_info.h"

namespace prefixquant {

enum class KvDtype : int { kInt4, kInt8, kFloat16, kBFloat16, kFloat32 };

// Arguments of one launch. Device pointers; strides in elements unless said otherwise.
struct KvAttentionGpuParams {
  const void* q = nullptr;              // [B, T, Hq, D], D contiguous and 16-byte aligned
  KvDtype q_dtype = KvDtype::kFloat16;  // float16 or bfloat16
  int64_t q_strides[3] = {};            // of b, t, h; multiples of 8

  // [pages, Hkv, page_size, row]: rows follow each other and are 16-byte aligned.
  const uint8_t* k = nullptr;
  const uint8_t* v = nullptr;
  KvDtype cache_dtype = KvDtype::kInt4;  // 16-bit caches need q in the same dtype
  int64_t k_strides[2] = {};             // bytes from page to page and from head to head
  int64_t v_strides[2] = {};
  const float* k_scale = nullptr;  // [Hkv], nullptr: 1
  const float* v_scale = nullptr;  // [Hkv], nullptr: 1

  const void* prefix_k = nullptr;  // [Hkv, P, D] contiguous
  const void* prefix_v = nullptr;
  KvDtype prefix_dtype = KvDtype::kFloat16;  // float16 or bfloat16
  int prefix = 0;                            // P

  // Rows of the cache that sequence b may attend: lengths[b], or max_length where it is nullptr.
  const int32_t* lengths = nullptr;
  int max_length = 0;  // host bound of lengths; what is beyond it is not attended

  // Page of row r: block_table[b, r / page_size], or page b where there is no table.
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int page_size = 1;  // rows of a page
  int64_t pages = 0;  // of the cache

  // bool [B, T, rows]; nullptr: causal, the last query token sees all rows of its sequence.
  const uint8_t* mask = nullptr;
  int64_t mask_strides[3] = {};

  int batch = 0;
  int tokens = 1;  // T
  int kv_heads = 0;
  int group = 1;  // query heads of a KV head
  int dim = 0;    // D: 64, 96, 128 or 256
  float scaling = 1.0f;

  void* out = nullptr;                  // [B, T, Hq, D] contiguous, q's dtype or int8
  const float* output_scale = nullptr;  // [] (device); nullptr: no quantization
  int output_qmin = -128;
  int output_qmax = 127;

  // kv_attention_workspace(): counters are zero before the first launch and left at zero by every
  // launch, so all layers of a stream can share them; partials need no initial value.
  void* counters = nullptr;
  void* partials = nullptr;
};

struct KvAttentionWorkspace {
  size_t counter_bytes = 0;
  size_t partial_bytes = 0;
};

bool kv_attention_supports_dim(int dim);

KvAttentionWorkspace kv_attention_workspace(const KvAttentionGpuParams& params, int sm_count);

// Asynchronous on `stream`, no allocation, no synchronisation: usable in a CUDA graph; the grid
// depends on sizes and max_length alone. Throws std::invalid_argument for impossible arguments,
// std::runtime_error for CUDA errors.
// The kernels of an arch run on every later one, too.
void launch_kv_attention(const KvAttentionGpuParams& params, const DeviceInfo& device,
                         cudaStream_t stream);

}  // namespace prefixquant
