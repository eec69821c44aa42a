// SPDX-License-Identifier: Apache-2.0
// The symmetric static quantizer on lanes and on rows, and the packing of its results to nibbles.
#pragma once

#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

// 1.5 * 2^23: adding it to |v| < 2^22 leaves rint(v), half to even, in the low mantissa bits.
constexpr float kRoundMagic = 12582912.0f;
constexpr int32_t kRoundMagicBits = 0x4B400000;

// q = clamp(rint(x * inv_scale), qmin, qmax). The bounds are integers, so clamping before rounding
// gives the same q and keeps the sum with kRoundMagic in range. A NaN quantizes to 0.
// The parameters travel by value: int8 stores may alias a struct behind a reference, which would be
// read again for every vector.
PQ_INLINE Ints<kLanes> quantize_lanes(Floats<kLanes> x, QuantizerParams p) {
  Floats<kLanes> v = x * p.inv_scale;
  const Floats<kLanes> zero = {}, low = zero + p.qmin, high = zero + p.qmax;
  v = v < low ? low : v;
  v = v > high ? high : v;
  v = v == v ? v : zero;
  return (Ints<kLanes>)(v + kRoundMagic) - kRoundMagicBits;
}

// ---- int32 lanes in [-128, 127] -> int8 ----

PQ_INLINE void store_int8(int8_t* to, Ints<kLanes> q) {
#if defined(PQ_ISA_avx2)
  const __m256i v = (__m256i)q;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
#else
  store(to, __builtin_convertvector(q, Bytes<kLanes>));
#endif
}

PQ_INLINE void store_int8_tail(int8_t* to, Ints<kLanes> q, int64_t count) {
  int8_t padded[kLanes];
  store_int8(padded, q);
  __builtin_memcpy(to, padded, count);
}

// Four vectors at once: two levels of saturating packs (exact here) instead of four narrowings. The
// 256 and 512-bit packs work inside 128-bit parts, so a permutation of 32-bit groups puts the bytes
// in order.
constexpr int kStep = 4 * kLanes;

PQ_INLINE void store_int8_step(int8_t* to, Ints<kLanes> a, Ints<kLanes> b, Ints<kLanes> c,
                               Ints<kLanes> d) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b),
                                           _mm512_packs_epi32((__m512i)c, (__m512i)d));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b),
                                           _mm256_packs_epi32((__m256i)c, (__m256i)d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(bytes, order));
#elif defined(__SSE2__)
  _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm_packs_epi32((__m128i)a, (__m128i)b),
                                                 _mm_packs_epi32((__m128i)c, (__m128i)d)));
#else
  store_int8(to, a);
  store_int8(to + kLanes, b);
  store_int8(to + 2 * kLanes, c);
  store_int8(to + 3 * kLanes, d);
#endif
}

// q[c] = quantize(lanes(c, n)[..]): `lanes(c, n)` gives the float32 values of elements c .. c + n -
// 1, n = kLanes except for the last, shorter piece of the row.
template <typename Lanes>
PQ_INLINE void quantize_each(int8_t* q, int64_t count, QuantizerParams p, Lanes&& lanes) {
  int64_t c = 0;
  for (; c + kStep <= count; c += kStep) {
    Ints<kLanes> v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = quantize_lanes(lanes(c + i * kLanes, kLanes), p);
    store_int8_step(q + c, v[0], v[1], v[2], v[3]);
  }
  for (; c + kLanes <= count; c += kLanes) store_int8(q + c, quantize_lanes(lanes(c, kLanes), p));
  if (c < count) store_int8_tail(q + c, quantize_lanes(lanes(c, count - c), p), count - c);
}

template <typename T>
PQ_INLINE void quantize_row(const T* x, int8_t* q, int64_t count, QuantizerParams p) {
  quantize_each(q, count, p, [x](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return n == kLanes ? load_float(x + c) : load_float_tail(x + c, n);
  });
}

// ---- int8 <-> nibbles ----
// A pair of values is one 16-bit lane, the even index in its low byte (the supported targets are
// little-endian).

constexpr int kPairs = 2 * kLanes;  // as many 16-bit lanes fill a register

// Two int8 values in [-8, 7] -> one byte, the even index in the low nibble; count is even.
PQ_INLINE void pack_row(const int8_t* q, uint8_t* packed, int64_t count) {
  int64_t i = 0;
  for (; i + kPairs <= count / 2; i += kPairs) {
    const auto pair = load<Shorts<kPairs>>(q + 2 * i);
    const Shorts<kPairs> byte = (pair & 0x0F) | ((pair >> 4) & 0xF0);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i v = (__m256i)byte;
    _mm_storeu_si128((__m128i*)(packed + i),
                     _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
    store(packed + i, __builtin_convertvector(byte, Bytes<kPairs>));
#endif
  }
  for (; i < count / 2; ++i) {
    packed[i] = static_cast<uint8_t>((q[2 * i] & 0xF) | (q[2 * i + 1] << 4));
  }
}

PQ_INLINE void unpack_row(const uint8_t* packed, int8_t* q, int64_t count) {
  int64_t i = 0;
  for (; i + kPairs <= count / 2; i += kPairs) {
#if defined(__AVX512BW__)
    const auto byte =
        (Shorts<kPairs>)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(packed + i)));
#elif defined(__AVX2__)
    const auto byte =
        (Shorts<kPairs>)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(packed + i)));
#else
    const auto byte =
        __builtin_convertvector(load<UnsignedBytes<kPairs>>(packed + i), Shorts<kPairs>);
#endif
    const Shorts<kPairs> pair = (byte & 0x0F) | ((byte & 0xF0) << 4);
    // Sign extension of both nibbles at once: (n ^ 8) - 8 in every byte.
    store(q + 2 * i, (Bytes<2 * kPairs>)(pair ^ 0x0808) - static_cast<int8_t>(8));
  }
  for (; i < count / 2; ++i) {
    q[2 * i] = static_cast<int8_t>(packed[i] << 4) >> 4;
    q[2 * i + 1] = static_cast<int8_t>(packed[i]) >> 4;
  }
}

PQ_ISA_NAMESPACE_END
