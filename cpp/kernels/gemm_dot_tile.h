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
#include "simd.h"

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

#elif defined(__AVX2__)

constexpr int kMaxRows = 4;

PQ_INLINE __m256i load_256(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// multiply: adds the products of `count` groups, for 8 outputs and MR rows, to sum.
struct WeightW4 {
  static constexpr uint32_t kOffset = 8;
  static constexpr int64_t kGroupBytes = 64;
  // vpmaddubsw adds two products of at most 15 * 128 in 16 bits; eight such pairs, of four groups,
  // still fit (30720 < 32767), so the sums are widened once in four groups.
  static constexpr int64_t kGroupsInWords = 4;

  template <int MR>
  PQ_INLINE void multiply(const int8_t* x, int64_t stride, const uint8_t* weight, int64_t count,
                          __m256i (&sum)[MR]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i words[MR];
    for (int i = 0; i < MR; ++i) words[i] = _mm256_setzero_si256();
    for (int64_t g = 0; g < count; ++g) {
      const __m256i v = load_256(weight + g * kGroupBytes);
      const __m256i k0 = _mm256_and_si256(v, nibble);
      const __m256i k4 = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
      for (int i = 0; i < MR; ++i) {
        const int8_t* xi = x + i * stride + g * kGroupInputs;
        const __m256i x0 = _mm256_set1_epi32(load_i32(xi));
        const __m256i x4 = _mm256_set1_epi32(load_i32(xi + 4));
        words[i] = _mm256_add_epi16(words[i], _mm256_maddubs_epi16(k0, x0));
        words[i] = _mm256_add_epi16(words[i], _mm256_maddubs_epi16(k4, x4));
      }
    }
    for (int i = 0; i < MR; ++i) {
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(words[i], _mm256_set1_epi16(1)));
    }
  }
};

// vpmaddubsw would saturate at 255 * 127 * 2: both sides are widened to 16 bits instead.
struct WeightW8 {
  static constexpr uint32_t kOffset = 128;
  static constexpr int64_t kGroupBytes = 128;
  static constexpr int64_t kGroupsInWords = 1;

  template <int MR>
  PQ_INLINE void multiply(const int8_t* x, int64_t stride, const uint8_t* weight, int64_t,
                          __m256i (&sum)[MR]) {
    for (int half = 0; half < 2; ++half) {  // inputs 0..3, then 4..7
      const __m256i v = load_256(weight + 64 * half);
      const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(v));
      const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1));
      for (int i = 0; i < MR; ++i) {
        const __m256i xi =
            _mm256_cvtepi8_epi16(_mm_set1_epi32(load_i32(x + i * stride + 4 * half)));
        const __m256i a = _mm256_madd_epi16(low, xi), b = _mm256_madd_epi16(high, xi);
        // hadd leaves outputs 0 1 4 5 | 2 3 6 7; the permutation puts them in order.
        const __m256i pairs = _mm256_hadd_epi32(a, b);
        sum[i] = _mm256_add_epi32(sum[i], _mm256_permute4x64_epi64(pairs, 0xD8));
      }
    }
  }
};

template <class Weight, int MR, int NB>
static void dot_tile(const RowTile& rows, const uint8_t* weight, int64_t block_bytes,
                     int32_t* acc) {
  constexpr int64_t kStep = Weight::kGroupsInWords;
  for (int b = 0; b < 2 * NB; ++b) {  // halves of 8 outputs
    const uint8_t* w = weight + b / 2 * block_bytes + b % 2 * 32;
    __m256i sum[MR];
    for (int i = 0; i < MR; ++i) sum[i] = _mm256_setzero_si256();
    int64_t g = 0;
    for (; g + kStep <= rows.groups; g += kStep) {
      Weight::multiply(rows.x + g * kGroupInputs, rows.stride, w + g * Weight::kGroupBytes, kStep,
                       sum);
    }
    for (; g < rows.groups; ++g) {
      Weight::multiply(rows.x + g * kGroupInputs, rows.stride, w + g * Weight::kGroupBytes, 1, sum);
    }
    if (rows.tail) Weight::multiply(rows.tail, kPadInputs, w + g * Weight::kGroupBytes, 1, sum);
    for (int i = 0; i < MR; ++i) {
      auto* to = reinterpret_cast<__m256i*>(acc + i * NB * 16 + b * 8);
      _mm256_storeu_si256(to, sum[i]);
    }
  }
}

#else  // portable

// SSE2 has no 32-bit integer product, float32 has one everywhere, and a sum of up to 512 products
// of at most 255 * 128 stays below 2^24, so it is exact. Chunks of 512 inputs are summed in float32
// and the chunks in int32.
constexpr int kMaxRows = 4;
constexpr int64_t kChunkGroups = 64;

struct WeightW4 {
  static constexpr uint32_t kOffset = 8;
  static constexpr int64_t kGroupBytes = 64;
  // Input j of a group, for the kLanes outputs whose words begin at p.
  PQ_INLINE Floats<kLanes> input(const uint8_t* p, int j) {
    const auto word = load<Words<kLanes> >(p);
    return __builtin_convertvector((Ints<kLanes>)(word >> (j % 4 * 8 + j / 4 * 4) & 15u),
                                   Floats<kLanes>);
  }
};

struct WeightW8 {
  static constexpr uint32_t kOffset = 128;
  static constexpr int64_t kGroupBytes = 128;
  PQ_INLINE Floats<kLanes> input(const uint8_t* p, int j) {
    const auto word = load<Words<kLanes> >(p + j / 4 * 64);
    return __builtin_convertvector((Ints<kLanes>)(word >> (j % 4 * 8) & 255u), Floats<kLanes>);
  }
};

template <class Weight, int MR, int NB>
static void dot_tile(const RowTile& rows, const uint8_t* weight, int64_t block_bytes,
                     int32_t* acc) {
  for (int i = 0; i < MR * NB * 16; ++i) acc[i] = 0;
  const int64_t groups = rows.groups + (rows.tail ? 1 : 0);
  float x[MR][kChunkGroups * kGroupInputs];
  for (int64_t g0 = 0; g0 < groups; g0 += kChunkGroups) {
    const int64_t count = groups - g0 < kChunkGroups ? groups - g0 : kChunkGroups;
    for (int i = 0; i < MR; ++i) {
      for (int64_t g = 0; g < count; ++g) {
        const int8_t* from = g0 + g < rows.groups
                                 ? rows.x + i * rows.stride + (g0 + g) * kGroupInputs
                                 : rows.tail + i * kPadInputs;
        for (int j = 0; j < kGroupInputs; ++j) x[i][g * kGroupInputs + j] = from[j];
      }
    }
    for (int r = 0; r < NB * 16; r += kLanes) {
      const uint8_t* w = weight + r / 16 * block_bytes + g0 * Weight::kGroupBytes + r % 16 * 4;
      Floats<kLanes> sum[MR] = {};
      for (int64_t g = 0; g < count; ++g, w += Weight::kGroupBytes) {
        for (int j = 0; j < kGroupInputs; ++j) {
          const auto wj = Weight::input(w, j);
          for (int i = 0; i < MR; ++i) sum[i] += wj * x[i][g * kGroupInputs + j];
        }
      }
      for (int i = 0; i < MR; ++i) {
        int32_t* to = acc + i * NB * 16 + r;
        const auto chunk = (Words<kLanes>)__builtin_convertvector(sum[i], Ints<kLanes>);
        store(to, load<Words<kLanes> >(to) + chunk);  // unsigned: wrapping is defined
      }
    }
  }
}

#endif

PQ_ISA_NAMESPACE_END
