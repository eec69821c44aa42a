// SPDX-License-Identifier: Apache-2.0
// The companding of int8 integers: each becomes the nearest of sixteen levels, in place.
#pragma once

#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

// The levels are kCompandFirst, kCompandFirst + the first step and so on, and their negatives. A
// step is taken at magnitudes of kCompandFrom and more: half-way, rounded up.
constexpr int kCompandSteps = 7;
constexpr int8_t kCompandFirst = 5;
constexpr int8_t kCompandStep[kCompandSteps] = {9, 11, 13, 15, 19, 23, 31};
constexpr int8_t kCompandFrom[kCompandSteps] = {10, 20, 32, 46, 63, 84, 111};

template <int N>
PQ_INLINE Bytes<N> compand_lanes(Bytes<N> q) {
  const Bytes<N> zero = {}, sign = q >> 7;
  q = q < -127 ? zero - static_cast<int8_t>(127) : q;  // has no positive of its size
  const Bytes<N> size = (q ^ sign) - sign;
  Bytes<N> level = zero + kCompandFirst;
#pragma GCC unroll 7
  for (int i = 0; i < kCompandSteps; ++i) {
    const Bytes<N> reached = size >= kCompandFrom[i];
    level += reached & kCompandStep[i];
  }
  return (level ^ sign) - sign;
}

PQ_INLINE void compand_row(int8_t* q, int64_t count) {
  constexpr int kBytes = 4 * kLanes;  // a register
  int64_t c = 0;
  for (; c + kBytes <= count; c += kBytes) {
    store(q + c, compand_lanes<kBytes>(load<Bytes<kBytes>>(q + c)));
  }
  if (c == count) return;
  int8_t padded[kBytes] = {};
  __builtin_memcpy(padded, q + c, count - c);
  store(padded, compand_lanes<kBytes>(load<Bytes<kBytes>>(padded)));
  __builtin_memcpy(q + c, padded, count - c);
}

PQ_ISA_NAMESPACE_END
