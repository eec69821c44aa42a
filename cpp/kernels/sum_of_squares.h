// SPDX-License-Identifier: Apache-2.0
// The sum of squares behind every RMSNorm, in float64 in 16 lanes (lane = column mod 16) whatever
// the register width, so every ISA adds in the same order.
#pragma once

#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

constexpr int kSumLanes = 16;

// sum + v * v. The square of a float32 is exact in float64, so the fused form rounds alike.
template <typename Doubles>
PQ_INLINE Doubles add_square(Doubles sum, Doubles v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)v, (__m512d)v, (__m512d)sum);
#else
  return sum + v * v;
#endif
}

// `x` is padded with zeros to a multiple of kSumLanes.
PQ_INLINE double sum_of_squares(const float* x, int64_t padded) {
  constexpr int kHalf = kLanes / 2;  // as many float64 fit in a register
  using Doubles = typename VectorOf<double, kHalf>::type;
  Doubles sum[kSumLanes / kHalf] = {};
  for (int64_t c = 0; c < padded; c += kSumLanes) {
    for (int i = 0; i < kSumLanes / kHalf; ++i) {
      const auto v = __builtin_convertvector(load<Floats<kHalf>>(x + c + i * kHalf), Doubles);
      sum[i] = add_square(sum[i], v);
    }
  }
  double lanes[kSumLanes];
  __builtin_memcpy(lanes, sum, sizeof(lanes));
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

PQ_ISA_NAMESPACE_END
