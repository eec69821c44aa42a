// SPDX-License-Identifier: Apache-2.0
// What the attention kernels of every instruction set are given. Strides are in elements.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prefixquant {

struct KvAttentionParams {
  const void* q;  // [batch, kv_heads * group, tokens, dim], dim contiguous
  FloatType q_type;
  int64_t q_strides[3];
  const uint8_t* k;  // [batch, kv_heads, cached, dim * bits / 8], last dimension contiguous
  const uint8_t* v;
  int64_t k_strides[3];  // bytes
  int64_t v_strides[3];
  int bits;              // 4: two values a byte, even index in the low nibble; 8: int8
  const float* k_scale;  // [kv_heads]
  const float* v_scale;  // [kv_heads]
  const void* prefix_k;  // [kv_heads, prefix, dim], contiguous
  const void* prefix_v;
  FloatType prefix_type;
  const uint8_t* mask;  // [batch, tokens, cached], nonzero = attend; nullptr = causal
  int64_t mask_strides[3];
  void* out;      // [batch, tokens, kv_heads * group, dim] contiguous, of q_type
  float scaling;  // of q . k, before the softmax
  int64_t batch;
  int64_t kv_heads;
  int64_t group;  // query heads of one KV head
  int64_t tokens;
  int64_t cached;
  int64_t prefix;
  int64_t dim;
  int max_threads;
};

}  // namespace prefixquant
