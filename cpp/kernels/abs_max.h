// SPDX-License-Identifier: Apache-2.0
// The largest magnitude of a row, NaN above infinity.
// Without the sign bit the bit patterns of a float order as the values do, with infinity above
// every number and NaN above infinity: an integer maximum is exact and lets a NaN through, as
// torch.amax.
#pragma once

#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

template <typename Bits, int N>
PQ_INLINE Bits max_magnitude(const void* row, int64_t cols, Bits mask) {
  using V = typename VectorOf<Bits, N>::type;
  constexpr int kAccumulators = 4;  // hides the latency of the maximum
  const Bits* x = static_cast<const Bits*>(row);
  V best[kAccumulators] = {};
  int64_t c = 0;
  for (; c + kAccumulators * N <= cols; c += kAccumulators * N) {
#pragma GCC unroll 4
    for (int i = 0; i < kAccumulators; ++i) {
      const V v = load<V>(x + c + i * N) & mask;
      best[i] = v > best[i] ? v : best[i];
    }
  }
  Bits result = 0;
  for (int i = 0; i < kAccumulators; ++i) {
    for (int lane = 0; lane < N; ++lane) result = best[i][lane] > result ? best[i][lane] : result;
  }
  for (; c < cols; ++c) {
    const Bits v = x[c] & mask;
    result = v > result ? v : result;
  }
  return result;
}

PQ_INLINE float abs_max_row(const float* x, int64_t cols) {
  return bits_float(max_magnitude<int32_t, kLanes>(x, cols, 0x7FFFFFFF));
}

// BFloat16 or Float16
template <typename T>
PQ_INLINE float abs_max_row(const T* x, int64_t cols) {
  return to_float(T{static_cast<uint16_t>(max_magnitude<int16_t, 2 * kLanes>(x, cols, 0x7FFF))});
}

PQ_ISA_NAMESPACE_END
