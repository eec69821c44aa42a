// SPDX-License-Identifier: Apache-2.0
// The panels that attention over a cache computes on, and how cached rows are unpacked into them.
//
//   K panel [dim, kBlock]: lanes are tokens, so that a score needs no sum across lanes.
//   V panel [kBlock, width]: lanes are channels. For 4 bits the even channels come first, then,
//   from half_width on, the odd ones: low and high nibbles are never interleaved, only the final
//   output is.
#pragma once

#include "../gemm_params.h"
#include "../kv_attention_params.h"
#include "isa_namespace.h"
#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

using FloatV = Floats<kLanes>;
using IntV = Ints<kLanes>;

constexpr int64_t kBlock = 32;    // tokens of a key block
constexpr int64_t kMaxRows = 64;  // rows of a task
constexpr int64_t kBlockVectors = kBlock / kLanes;
constexpr int kTileRows = 4;  // rows sharing the loads of a panel
constexpr float kMinusInfinity = -__builtin_inff();

PQ_INLINE int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

PQ_INLINE FloatV broadcast(float v) { return v - FloatV{}; }

// The buffers of one task, in one piece of thread scratch.
struct Workspace {
  float* q;         // [kMaxRows, dim], times scaling
  float* out;       // [kMaxRows, width], not yet divided by total
  float* k_panel;   // [dim, kBlock]
  float* v_panel;   // [kBlock, width]
  float* score;     // [kMaxRows, kBlock]: logits, then probabilities
  float* top;       // [kMaxRows]: greatest logit so far
  float* total;     // [kMaxRows]: sum of exp(logit - top)
  float* row;       // [dim]: one row on its way in or out
  uint32_t* words;  // [words of a K row, kBlock]
  int64_t half_width;
  int64_t width;

  // bits 16 stands for floating rows of any width.
  Workspace(int64_t dim, int bits) {
    half_width = bits == 4 ? round_up_lanes(dim / 2) : 0;
    width = bits == 4 ? 2 * half_width : round_up_lanes(dim);
    const int64_t word_count = bits < 16 ? (dim * bits / 8 + 3) / 4 : 0;
    const int64_t sizes[] = {kMaxRows * dim,     kMaxRows * width, dim * kBlock, kBlock * width,
                             kMaxRows * kBlock,  kMaxRows,         kMaxRows,     dim,
                             word_count * kBlock};
    int64_t total_floats = 0;
    for (int64_t size : sizes) total_floats += (size + 15) / 16 * 16;
    float* at = static_cast<float*>(thread_scratch(ScratchSlot::kPanel, total_floats * 4));
    float** fields[] = {&q, &out, &k_panel, &v_panel, &score, &top, &total, &row};
    for (int i = 0; i < 8; ++i) {
      *fields[i] = at;
      at += (sizes[i] + 15) / 16 * 16;
    }
    words = reinterpret_cast<uint32_t*>(at);
  }

  // Where channel d lies in a row of v_panel and out.
  int64_t column(int64_t d) const { return half_width ? d % 2 * half_width + d / 2 : d; }
};

// ---- unpacking ----

// K of `count` cached tokens -> k_panel; the columns of missing tokens are zero. Every 32-bit word
// of a row (8 or 4 channels) is first laid beside the same word of the other tokens.
template <int BITS>
PQ_INLINE void unpack_k(const uint8_t* k, int64_t stride, int64_t count, int64_t dim,
                        Workspace& w) {
  constexpr int kPerWord = 32 / BITS;
  const int64_t bytes = dim * BITS / 8;
  const int64_t whole = bytes / 4;
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* row = k + t * stride;
    for (int64_t j = 0; j < whole; ++j) w.words[j * kBlock + t] = load<uint32_t>(row + 4 * j);
    if (bytes % 4) {
      uint32_t last = 0;
      __builtin_memcpy(&last, row + 4 * whole, bytes % 4);
      w.words[whole * kBlock + t] = last;
    }
  }
  for (int64_t t = count; t < kBlock; ++t) {
    for (int64_t j = 0; j < (bytes + 3) / 4; ++j) w.words[j * kBlock + t] = 0;
  }
  for (int64_t d0 = 0; d0 < dim; d0 += kPerWord) {
    for (int64_t i = 0; i < kBlockVectors; ++i) {
      const IntV word = load<IntV>(w.words + d0 / kPerWord * kBlock + i * kLanes);
      for (int c = 0; c < kPerWord && d0 + c < dim; ++c) {
        const IntV value =
            word << (32 - BITS - BITS * c) >> (32 - BITS);  // up, then down with sign
        store(w.k_panel + (d0 + c) * kBlock + i * kLanes, __builtin_convertvector(value, FloatV));
      }
    }
  }
}

// kLanes signed bytes, widened. (GCC 12 turns the vector conversion into one insertion a lane.)
PQ_INLINE IntV load_bytes(const uint8_t* from) {
#if defined(PQ_ISA_avx512) || defined(PQ_ISA_amx)
  return (IntV)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(PQ_ISA_avx2)
  return (IntV)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return __builtin_convertvector(load<Bytes<kLanes> >(from), IntV);
#endif
}

template <int BITS>
PQ_INLINE void unpack_v_lanes(const uint8_t* from, float* to, int64_t half_width) {
  const IntV wide = load_bytes(from);
  if constexpr (BITS == 4) {
    store(to, __builtin_convertvector(wide << 28 >> 28, FloatV));
    store(to + half_width, __builtin_convertvector(wide >> 4, FloatV));
  } else {
    store(to, __builtin_convertvector(wide, FloatV));
  }
}

// V of `count` cached tokens -> v_panel; rows of missing tokens are never read afterwards.
template <int BITS>
PQ_INLINE void unpack_v(const uint8_t* v, int64_t stride, int64_t count, int64_t dim,
                        Workspace& w) {
  const int64_t bytes = dim * BITS / 8;
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* row = v + t * stride;
    float* to = w.v_panel + t * w.width;
    int64_t c = 0;
    for (; c + kLanes <= bytes; c += kLanes) {
      unpack_v_lanes<BITS>(row + c, to + c, w.half_width);
    }
    if (c < bytes) {
      uint8_t padded[kLanes] = {};
      __builtin_memcpy(padded, row + c, bytes - c);
      unpack_v_lanes<BITS>(padded, to + c, w.half_width);
    }
  }
}

// Exactly `count` floats of `from` -> to.
template <typename T>
PQ_INLINE void load_floats(const T* from, float* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load_float(from + c));
  if (c == count) return;
  const FloatV last = load_float_tail(from + c, count - c);
  __builtin_memcpy(to + c, &last, (count - c) * sizeof(float));
}

// `count` floating rows `stride` elements apart -> k_panel, columns of missing tokens zero.
template <typename T>
PQ_INLINE void unpack_float_k(const T* k, int64_t stride, int64_t count, int64_t dim,
                              Workspace& w) {
  for (int64_t i = 0; i < dim * kBlock; ++i) w.k_panel[i] = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    load_floats(k + t * stride, w.row, dim);
    for (int64_t d = 0; d < dim; ++d) w.k_panel[d * kBlock + t] = w.row[d];
  }
}

// `count` floating rows -> v_panel; the columns between dim and width are zero.
template <typename T>
PQ_INLINE void unpack_float_v(const T* v, int64_t stride, int64_t count, int64_t dim,
                              Workspace& w) {
  for (int64_t t = 0; t < count; ++t) {
    float* to = w.v_panel + t * w.width;
    for (int64_t c = 0; c < w.width; ++c) to[c] = 0.0f;
    if (w.half_width == 0) {
      load_floats(v + t * stride, to, dim);
      continue;
    }
    load_floats(v + t * stride, w.row, dim);
    for (int64_t d = 0; d < dim; ++d) to[w.column(d)] = w.row[d];
  }
}

PQ_ISA_NAMESPACE_END
