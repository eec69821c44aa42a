// SPDX-License-Identifier: Apache-2.0
// Lanes: the vector types of the kernels, their loads and stores, and the conversions between
// float32 and the 16-bit floats. Compiler vector extensions (GCC, Clang) instead of one file of
// intrinsics an ISA: an operator on a vector is the same IEEE operation in every lane, so every
// instruction set rounds alike by construction. Lane counts may differ between ISAs because nothing
// here reduces across lanes.
#pragma once

#include <cstdint>

#include "half.h"
#include "isa_namespace.h"
#include "params.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PQ_INLINE static inline __attribute__((always_inline))
#define PQ_INLINE_LAMBDA __attribute__((always_inline))

PQ_ISA_NAMESPACE_BEGIN

#if defined(PQ_ISA_avx512) || defined(PQ_ISA_amx)
constexpr int kLanes = 16;
#elif defined(PQ_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON: 16-byte registers
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <int N>
using Floats = typename VectorOf<float, N>::type;
template <int N>
using Ints = typename VectorOf<int32_t, N>::type;
template <int N>
using Words = typename VectorOf<uint32_t, N>::type;
template <int N>
using Shorts = typename VectorOf<uint16_t, N>::type;
template <int N>
using Bytes = typename VectorOf<int8_t, N>::type;
template <int N>
using UnsignedBytes = typename VectorOf<uint8_t, N>::type;

template <typename V>
PQ_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
PQ_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// ---- widening and narrowing ----
// __builtin_convertvector, except where GCC takes it apart lane by lane (GCC 12: int8 -> int32 on
// every ISA, 5x slower; uint16 -> uint32 in two halves).

PQ_INLINE Ints<kLanes> load_widened(const int8_t* from) {
#if defined(__AVX512F__)
  return (Ints<kLanes>)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints<kLanes>)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  using HalfWay = typename VectorOf<int16_t, kLanes>::type;
  const auto shorts = __builtin_convertvector(load<Bytes<kLanes>>(from), HalfWay);
  return __builtin_convertvector(shorts, Ints<kLanes>);
#endif
}

PQ_INLINE Words<kLanes> load_widened(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Words<kLanes>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (Words<kLanes>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  return __builtin_convertvector(load<Shorts<kLanes>>(from), Words<kLanes>);
#endif
}

// Lanes below 2^16.
PQ_INLINE void store_narrowed(uint16_t* to, Words<kLanes> value) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i v = (__m256i)value;
  _mm_storeu_si128((__m128i*)to,
                   _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  store(to, __builtin_convertvector(value, Shorts<kLanes>));
#endif
}

// ---- float32 <-> float32, bfloat16, float16 ----
// The storage types BFloat16 and Float16 are half.h's: overloads pick the conversion.
PQ_INLINE Floats<kLanes> load_float(const float* from) { return load<Floats<kLanes>>(from); }

PQ_INLINE Floats<kLanes> load_float(const BFloat16* from) {
  return (Floats<kLanes>)(load_widened(&from->bits) << 16);
}

PQ_INLINE void store_float(float* to, Floats<kLanes> value) { store(to, value); }

PQ_INLINE void store_float(BFloat16* to, Floats<kLanes> value) {
  const Words<kLanes> bits = (Words<kLanes>)value;
  // Round to nearest, ties to even; NaN becomes the one quiet NaN that torch writes.
  Words<kLanes> rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words<kLanes> is_number = (Words<kLanes>)((bits & 0x7FFFFFFFu) <= 0x7F800000u);
  rounded = (rounded & is_number) | (0x7FC0u & ~is_number);
  store_narrowed(&to->bits, rounded);
}

#if defined(__F16C__)
PQ_INLINE Floats<kLanes> load_float(const Float16* from) {
#if defined(PQ_ISA_avx2)
  return (Floats<kLanes>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  return (Floats<kLanes>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#endif
}

PQ_INLINE void store_float(Float16* to, Floats<kLanes> value) {
#if defined(PQ_ISA_avx2)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
PQ_INLINE Floats<kLanes> load_float(const Float16* from) {
  const Words<kLanes> bits = load_widened(&from->bits);
  const Words<kLanes> sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  // Exponents are rebiased by 112 (127 - 15); infinities and NaNs by another 112, up to 255. F16C
  // makes NaNs quiet, so the software form does.
  const Words<kLanes> special = (Words<kLanes>)(magnitude >= 0x7C00u);
  const Words<kLanes> is_nan = (Words<kLanes>)(magnitude > 0x7C00u);
  const Words<kLanes> normal =
      ((magnitude << 13) + (112u << 23) + (special & (112u << 23))) | (is_nan & 0x00400000u);
  // Subnormals are magnitude * 2^-24, exact in float32.
  const Floats<kLanes> tiny =
      __builtin_convertvector((Ints<kLanes>)magnitude, Floats<kLanes>) * 0x1p-24f;
  const Words<kLanes> is_tiny = (Words<kLanes>)(magnitude < 0x0400u);
  return (Floats<kLanes>)(sign | (is_tiny & (Words<kLanes>)tiny) | (~is_tiny & normal));
}

PQ_INLINE void store_float(Float16* to, Floats<kLanes> value) {
  const Words<kLanes> bits = (Words<kLanes>)value;
  const Words<kLanes> sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14 the sum with 0.5 has its last bit at 2^-24, the subnormal step: it rounds for us.
  const Words<kLanes> tiny = (Words<kLanes>)((Floats<kLanes>)magnitude + 0.5f) - 0x3F000000u;
  // Otherwise round to nearest even at bit 13; values that round past 65504 reach 0x7C00 by carry.
  const Words<kLanes> normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Words<kLanes> is_tiny = (Words<kLanes>)(magnitude < 0x38800000u);
  const Words<kLanes> is_huge = (Words<kLanes>)(magnitude >= 0x47800000u);
  const Words<kLanes> is_nan = (Words<kLanes>)(magnitude > 0x7F800000u);
  Words<kLanes> half = (is_tiny & tiny) | (~is_tiny & normal);
  const Words<kLanes> payload = is_nan & (0x0200u | ((magnitude >> 13) & 0x03FFu));
  half = (is_huge & (0x7C00u | payload)) | (~is_huge & half);
  store_narrowed(&to->bits, sign | half);
}
#endif

// The last count < kLanes elements of a row; the lanes beyond are zero.
template <typename T>
PQ_INLINE Floats<kLanes> load_float_tail(const T* from, int64_t count) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof(T));
  return load_float(padded);
}

template <typename T>
PQ_INLINE void store_float_tail(T* to, Floats<kLanes> value, int64_t count) {
  T padded[kLanes];
  store_float(padded, value);
  __builtin_memcpy(to, padded, count * sizeof(T));
}

// Row of `count` elements -> float32, up to and including the zeros that fill the last vector.
template <typename T>
PQ_INLINE void load_row(const T* from, float* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load_float(from + c));
  if (c < count) store(to + c, load_float_tail(from + c, count - c));
}

// Calls fn(const T*) with the storage type of `type`.
template <typename Fn>
PQ_INLINE void with_float_type(FloatType type, const void* data, Fn&& fn) {
  switch (type) {
    case FloatType::kFloat32:
      return fn(static_cast<const float*>(data));
    case FloatType::kBFloat16:
      return fn(static_cast<const BFloat16*>(data));
    case FloatType::kFloat16:
      return fn(static_cast<const Float16*>(data));
  }
}

PQ_ISA_NAMESPACE_END
