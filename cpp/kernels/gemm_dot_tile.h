// SPDX-License-Identifier: Apache-2.0
// dot_tile: the micro-kernel of the low-bit GEMM, for each instruction set.
//
// Computes acc[i][16 b + r] = sum_k x[i, k] * (w[16 b + r, k] + kOffset) in int32 (modulo 2^32),
// for MR rows of x and NB blocks of 16 outputs, straight from the prepacked weight (gemm_params.h).
// The 4-bit weights are unpacked in registers: three instructions per 64 bytes, against 4 MR
// multiplies.
#pragma once

#include "../gemm_params.h"
#include "isa_namespace.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

PQ_ISA_NAMESPACE_BEGIN

// The rows of x that a micro-kernel reads: `groups` groups of 8 inputs from x, then, where 8 does
// not divide K, one zero-padded group per row from tail (rows of it are kPadInputs apart).
struct RowTile {
  const int8_t* x;
  int64_t stride;
  int64_t groups;
  const int8_t* tail;  // nullptr: none
};

static inline int32_t load_i32(const int8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX512VNNI__)

// 12 x 32: 24 accumulators, 4 weight registers, one broadcast and the nibble mask fill 30 of the 32
// registers, and 24 independent chains cover the 5-cycle latency of vpdpbusd twice over.
constexpr int kMaxRows = 12;

struct WeightW4 {
  static constexpr uint32_t kOffset = 8;
  static constexpr int64_t kGroupBytes = 64;
  static inline void load(const uint8_t* p, __m512i* k0, __m512i* k4) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i v = _mm512_loadu_si512(p);
    *k0 = _mm512_and_si512(v, nibble);
    *k4 = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
  }
};

struct WeightW8 {
  static constexpr uint32_t kOffset = 128;
  static constexpr int64_t kGroupBytes = 128;
  static inline void load(const uint8_t* p, __m512i* k0, __m512i* k4) {
    *k0 = _mm512_loadu_si512(p);
    *k4 = _mm512_loadu_si512(p + 64);
  }
};

template <class Weight, int MR, int NB>
static void dot_tile(const RowTile& rows, const uint8_t* weight, int64_t block_bytes,
                     int32_t* acc) {
  __m512i sum[MR][NB];
  for (int i = 0; i < MR; ++i) {
    for (int b = 0; b < NB; ++b) sum[i][b] = _mm512_setzero_si512();
  }
  // One pointer for three rows (base, base + stride, base + 2 stride are addressing modes): twelve
  // row pointers would not fit the general registers.
  constexpr int kBases = (MR + 2) / 3;
  const int8_t* base[kBases];
  for (int j = 0; j < kBases; ++j) base[j] = rows.x + 3 * j * rows.stride;
  int64_t stride = rows.stride;
  const int64_t groups = rows.groups + (rows.tail ? 1 : 0);
  for (int64_t g = 0; g < groups; ++g) {
    if (g == rows.groups) {  // the last, zero-padded group
      stride = kPadInputs;
      for (int j = 0; j < kBases; ++j) base[j] = rows.tail + 3 * j * stride;
    }
    __m512i k0[NB], k4[NB];
    for (int b = 0; b < NB; ++b) Weight::load(weight + b * block_bytes, &k0[b], &k4[b]);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const int8_t* xi = base[i / 3] + i % 3 * stride;
      const __m512i x0 = _mm512_set1_epi32(load_i32(xi));
      for (int b = 0; b < NB; ++b) sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], k0[b], x0);
      const __m512i x4 = _mm512_set1_epi32(load_i32(xi + 4));
      for (int b = 0; b < NB; ++b) sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], k4[b], x4);
    }
    for (int j = 0; j < kBases; ++j) base[j] += kGroupInputs;
    weight += Weight::kGroupBytes;
  }
  for (int i = 0; i < MR; ++i) {
    for (int b = 0; b < NB; ++b) _mm512_storeu_si512(acc + (i * NB + b) * 16, sum[i][b]);
  }
}

#else  // portable

constexpr int kMaxRows = 4;

struct WeightW4 {
  static constexpr uint32_t kOffset = 8;
  static constexpr int64_t kGroupBytes = 64;
  static inline void load(const uint8_t* p, int16_t w[8][16]) {
    for (int j = 0; j < 4; ++j) {
      for (int r = 0; r < 16; ++r) {
        w[j][r] = p[4 * r + j] & 15;
        w[4 + j][r] = p[4 * r + j] >> 4;
      }
    }
  }
};

struct WeightW8 {
  static constexpr uint32_t kOffset = 128;
  static constexpr int64_t kGroupBytes = 128;
  static inline void load(const uint8_t* p, int16_t w[8][16]) {
    for (int j = 0; j < 4; ++j) {
      for (int r = 0; r < 16; ++r) {
        w[j][r] = p[4 * r + j];
        w[4 + j][r] = p[64 + 4 * r + j];
      }
    }
  }
};

template <class Weight, int MR, int NB>
static void dot_tile(const RowTile& rows, const uint8_t* weight, int64_t block_bytes,
                     int32_t* acc) {
  for (int b = 0; b < NB; ++b) {
    uint32_t sum[MR][16] = {};  // unsigned: wrapping is defined
    const auto multiply_group = [&](const int8_t* x, int64_t stride, const uint8_t* w) {
      int16_t unpacked[8][16];
      Weight::load(w, unpacked);
      for (int i = 0; i < MR; ++i) {
        for (int j = 0; j < 8; ++j) {
          const int16_t xj = x[i * stride + j];
          for (int r = 0; r < 16; ++r) sum[i][r] += static_cast<uint32_t>(unpacked[j][r] * xj);
        }
      }
    };
    const uint8_t* w = weight + b * block_bytes;
    for (int64_t g = 0; g < rows.groups; ++g) {
      multiply_group(rows.x + g * kGroupInputs, rows.stride, w + g * Weight::kGroupBytes);
    }
    if (rows.tail) multiply_group(rows.tail, kPadInputs, w + rows.groups * Weight::kGroupBytes);
    for (int i = 0; i < MR; ++i) {
      for (int r = 0; r < 16; ++r) acc[(i * NB + b) * 16 + r] = static_cast<int32_t>(sum[i][r]);
    }
  }
}

#endif

PQ_ISA_NAMESPACE_END
