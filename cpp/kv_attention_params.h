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
  const void* k;  // [pages, kv_heads, page_size, dim or dim / 2], last dimension contiguous
  const void* v;
  int64_t k_strides[3];
  int64_t v_strides[3];
  int bits;  // 4: two values a byte, even index in the low nibble; 8: int8; 16: floating
  FloatType cache_type;  // of k and v at 16 bits
  const float* k_scale;  // [kv_heads], not read at 16 bits
  const float* v_scale;
  // Sequence b lies in page first_page + b, or, where block_table is given, in the pages
  // block_table[b * block_table_stride ..] of page_size rows each.
  const int32_t* block_table;
  int64_t block_table_stride;
  int64_t page_size;
  int64_t first_page;
  const void* prefix_k;  // [kv_heads, prefix, dim], contiguous
  const void* prefix_v;
  FloatType prefix_type;
  const uint8_t* mask;  // [batch, tokens, cached], nonzero = attend; nullptr = causal
  int64_t mask_strides[3];
  void* out;  // [batch, tokens, kv_heads * group, dim] contiguous, of q_type or int8
  bool output_quantized;
  QuantizerParams output_quantizer;
  float scaling;  // of q . k, before the softmax
  int64_t batch;
  int64_t kv_heads;
  int64_t group;  // query heads of one KV head
  int64_t tokens;
  int64_t cached;          // keys of every sequence, or the most of one where lengths is given
  const int32_t* lengths;  // [batch] or nullptr
  int64_t prefix;
  int64_t dim;
  int max_threads;
};

}  // namespace prefixquant
