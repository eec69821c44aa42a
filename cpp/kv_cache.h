// SPDX-License-Identifier: Apache-2.0
// The checks of a paged or contiguous KV cache that the operations on it share.
//   k_cache, v_cache [pages, kv_heads, page_size, dim / 2] uint8 (4 bits, even index in the low
//   nibble), [.., dim] int8 (8 bits) or [.., dim] floating (16 bits); last dimension contiguous.
//   scales float32 [kv_heads], absent at 16 bits.
#pragma once

#include "rows.h"
#include "tensor_view.h"

namespace prefixquant {

// Checked sizes of a cache.
struct CacheView {
  int64_t pages;
  int64_t kv_heads;
  int64_t page_size;
  int bits;
  FloatType type;  // at 16 bits

  CacheView(const ArgumentChecker& check, const TensorView& k, const TensorView& v,
            const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t kv_bits,
            int64_t dim)
      : bits(static_cast<int>(kv_bits)), type(FloatType::kFloat32) {
    PQ_CHECK(check.op, kv_bits == 4 || kv_bits == 8 || kv_bits == 16,
             "kv_bits: expected 4, 8 or 16, got ", kv_bits);
    check_half(check, k, "k_cache", dim);
    pages = k.size(0);
    kv_heads = k.size(1);
    page_size = k.size(2);
    PQ_CHECK(check.op, kv_heads > 0, "k_cache: expected at least one head, got shape ",
             k.shape_text());
    check.dtype(v, "v_cache", k.dtype);
    check_half(check, v, "v_cache", dim);
    check.same_shape(v, "v_cache", k, "k_cache");
    check_scale(check, k_scale, "k_scale");
    check_scale(check, v_scale, "v_scale");
  }

 private:
  void check_half(const ArgumentChecker& check, const TensorView& t, const char* name,
                  int64_t dim) {
    check.on_cpu(t, name);
    if (bits == 16) {
      type = float_type(check, t, name);
    } else {
      check.dtype(t, name, bits == 4 ? DType::kUInt8 : DType::kInt8);
    }
    check.rank(t, name, 4);
    check.size(t, name, 3, bits == 4 ? dim / 2 : dim);
    PQ_CHECK(check.op, t.size(-1) <= 1 || t.stride(-1) == 1, name,
             ": expected a contiguous last dimension, got stride ", t.stride(-1));
  }

  void check_scale(const ArgumentChecker& check, const OptionalTensor& scale,
                   const char* name) const {
    if (bits == 16) return;
    PQ_CHECK(check.op, scale.has_value(), name, ": expected a tensor at ", bits, " bits, got None");
    check.on_cpu(*scale, name);
    check.dtype(*scale, name, DType::kFloat32);
    check.rank(*scale, name, 1);
    check.size(*scale, name, 0, kv_heads);
    check.contiguous(*scale, name);
  }
};

inline void copy_strides(const TensorView& t, int64_t (&strides)[3]) {
  for (int i = 0; i < 3; ++i) strides[i] = t.strides[i];
}

}  // namespace prefixquant
