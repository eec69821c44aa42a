// SPDX-License-Identifier: Apache-2.0
// The companding of int8 integers: each becomes the nearest of sixteen levels, in place.
#pragma once

#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

// And their negatives.
constexpr int kCompandSizes = 8;
constexpr int kCompandSize[kCompandSizes] = {5, 14, 25, 38, 53, 72, 95, 126};

template <int N>
PQ_INLINE Bytes<N> compand_lanes(Bytes<N> q) {
  const Bytes<N> zero = {}, sign = q >> 7;
  q = q < -127 ? zero - static_cast<int8_t>(127) : q;  // has no positive of its size
  const Bytes<N> size = (q ^ sign) - sign;
  Bytes<N> level = zero + static_cast<int8_t>(kCompandSize[0]);
#pragma GCC unroll 7
  for (int i = 1; i < kCompandSizes; ++i) {
    // Half-way, rounded up: it is no integer.
    const auto from = static_cast<int8_t>((kCompandSize[i - 1] + kCompandSize[i] + 1) / 2);
    const auto step = static_cast<int8_t>(kCompandSize[i] - kCompandSize[i - 1]);
    const Bytes<N> reached = size >= from;
    level += reached & step;
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
