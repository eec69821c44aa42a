// SPDX-License-Identifier: Apache-2.0
// What lies between the q/k/v projections and the attention, token by token: RMSNorm of the heads
// (where the model has one), RoPE, the Hadamard R3, and keys and values written to the cache.
#include <type_traits>

#include "hadamard.h"
#include "quantize.h"
#include "sum_of_squares.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

PQ_INLINE int64_t round_up_16(int64_t count) { return (count + 15) / 16 * 16; }

// x = (x * rstd) * weight; x is padded with zeros to a multiple of kSumLanes.
template <typename W>
PQ_INLINE void normalize(float* x, const W* weight, int64_t dim, double eps) {
  const double mean = sum_of_squares(x, round_up_16(dim)) / static_cast<double>(dim);
  const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + eps));
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    store(x + c, (load_float(x + c) * rstd) * load_float(weight + c));
  }
  for (; c < dim; ++c) x[c] = (x[c] * rstd) * to_float(weight[c]);
}

// y = x * cos + rotate_half(x) * sin, where rotate_half((a, b)) = (-b, a).
PQ_INLINE void rope(const float* x, const float* cos, const float* sin, float* y, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t c = 0;
  for (; c + kLanes <= half; c += kLanes) {
    const Floats<kLanes> a = load_float(x + c), b = load_float(x + half + c);
    store(y + c, a * load_float(cos + c) - b * load_float(sin + c));
    store(y + half + c, b * load_float(cos + half + c) + a * load_float(sin + half + c));
  }
  for (; c < half; ++c) {
    const float a = x[c], b = x[half + c];
    y[c] = a * cos[c] - b * sin[c];
    y[half + c] = b * cos[half + c] + a * sin[half + c];
  }
}

template <typename T>
PQ_INLINE void store_head(TransformedBlock from, T* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    store_float(to + c, load_float(from.data + c) * from.factor);
  }
  for (; c < count; ++c) from_float(from.data[c] * from.factor, to + c);
}

// One head of a token -> row `at` (in elements) of a cache.
PQ_INLINE void store_cached(const RopeKvRows& p, TransformedBlock head, const float* scale,
                            void* cache, int64_t at, int8_t* unpacked) {
  if (p.kv_bits == 16) {
    with_float_type(p.cache_type, cache, [&](const auto* typed) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
      store_head(head, static_cast<T*>(cache) + at, p.dim);
    });
    return;
  }
  const float qmax = p.kv_bits == 4 ? 7.0f : 127.0f;
  const QuantizerParams quantizer{1.0f / *scale, -qmax - 1.0f, qmax};
  uint8_t* out = static_cast<uint8_t*>(cache) + at;
  int8_t* q = p.kv_bits == 4 ? unpacked : reinterpret_cast<int8_t*>(out);
  quantize_block(head, q, p.dim, quantizer);
  if (p.kv_bits == 4) pack_row(q, out, p.dim);
}

// The work buffers of a thread, each of dim floats rounded up to 16.
struct Buffers {
  float* head;
  float* rotated;
  float* transformed;
  int8_t* unpacked;

  Buffers(float* scratch, int64_t dim)
      : head(scratch),
        rotated(head + round_up_16(dim)),
        transformed(rotated + round_up_16(dim)),
        unpacked(reinterpret_cast<int8_t*>(transformed + round_up_16(dim))) {}
};

// A query or key head in float32 after norm, RoPE and R3.
template <typename T>
PQ_INLINE TransformedBlock rotated_head(const RopeKvRows& p, const T* from, const void* norm,
                                        int64_t position, const Buffers& b) {
  load_row(from, b.head, p.dim);
  if (norm) {
    for (int64_t c = (p.dim + kLanes - 1) / kLanes * kLanes; c < round_up_16(p.dim); ++c) {
      b.head[c] = 0.0f;
    }
    with_float_type(p.norm_type, norm,
                    [&](const auto* weight) { normalize(b.head, weight, p.dim, p.eps); });
  }
  rope(b.head, p.cos + position * p.dim, p.sin + position * p.dim, b.rotated, p.dim);
  return p.rotation.block > 1 ? hadamard_block(b.rotated, b.transformed, p.rotation)
                              : TransformedBlock{b.rotated, 1.0f};
}

// KV heads [first, last) of a row and the query heads that use them.
template <typename T>
PQ_INLINE void append_heads(const RopeKvRows& p, const T* qkv, int64_t row, int64_t first,
                            int64_t last, const Buffers& b) {
  const T* from = qkv + row * p.qkv_stride;
  const int64_t position = p.positions[row], slot = p.slots[row], group = p.heads / p.kv_heads;
  T* q = static_cast<T*>(p.q) + row * p.heads * p.dim;
  for (int64_t h = first * group; h < last * group; ++h) {
    const T* head = from + h * p.dim;
    store_head(rotated_head(p, head, p.q_norm, position, b), q + h * p.dim, p.dim);
  }
  if (slot < 0) return;
  const int64_t page = slot / p.page_size, offset = slot % p.page_size;
  for (int64_t h = first; h < last; ++h) {
    const int64_t at = page * p.k_strides[0] + h * p.k_strides[1] + offset * p.k_strides[2];
    TransformedBlock key = rotated_head(p, from + (p.heads + h) * p.dim, p.k_norm, position, b);
    if (p.k_shift) key = subtract_shift(key, p.k_shift + h * p.dim, b.head, p.dim);
    store_cached(p, key, p.k_scale + h, p.k_cache, at, b.unpacked);
  }
  for (int64_t h = first; h < last; ++h) {
    const int64_t at = page * p.v_strides[0] + h * p.v_strides[1] + offset * p.v_strides[2];
    load_row(from + (p.heads + p.kv_heads + h) * p.dim, b.head, p.dim);
    store_cached(p, {b.head, 1.0f}, p.v_scale + h, p.v_cache, at, b.unpacked);
  }
}

}  // namespace

// scratch: 4 * round_up(dim, 16) floats.
void rope_kv_append_rows(const RopeKvRows& p, int64_t row_begin, int64_t row_end, float* scratch) {
  const Buffers buffers(scratch, p.dim);
  with_float_type(p.type, p.qkv, [&](const auto* qkv) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      append_heads(p, qkv, row, 0, p.kv_heads, buffers);
    }
  });
}

// One KV head of one row.
void rope_kv_append_head(const RopeKvRows& p, int64_t row, int64_t kv_head, float* scratch) {
  const Buffers buffers(scratch, p.dim);
  with_float_type(p.type, p.qkv, [&](const auto* qkv) {
    append_heads(p, qkv, row, kv_head, kv_head + 1, buffers);
  });
}

PQ_ISA_NAMESPACE_END
