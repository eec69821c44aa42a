// SPDX-License-Identifier: Apache-2.0
//
// The levels of compand.h on registers, four bytes at a time; the same bits as
// cpp/kernels/compand.h.
#pragma once

#include <cstdint>

namespace prefixquant {

// And their negatives.
inline constexpr int kCompandSizes = 8;
__device__ constexpr uint32_t kCompandSize[kCompandSizes] = {5, 14, 25, 38, 53, 72, 95, 126};

// Four int8 to their levels. No sum or difference below carries from one byte into the next.
__device__ __forceinline__ uint32_t compand4(uint32_t q) {
  constexpr uint32_t kOnes = 0x01010101u, kHigh = 0x80808080u;
  const uint32_t negative = (q & kHigh) >> 7;  // 1 where a byte is below 0
  const uint32_t sign = negative * 0xFFu;
  uint32_t size = (q ^ sign) + negative;
  size -= (size & kHigh) >> 7;  // 128 to 127
  const uint32_t marked = size | kHigh;
  uint32_t level = kOnes * kCompandSize[0];
#pragma unroll
  for (int i = 1; i < kCompandSizes; ++i) {
    // Half-way, rounded up: it is no integer.
    const uint32_t from = (kCompandSize[i - 1] + kCompandSize[i] + 1) / 2;
    const uint32_t reached = (marked - kOnes * from) & kHigh;  // where size >= from
    level += (reached >> 7) * (kCompandSize[i] - kCompandSize[i - 1]);
  }
  return (level ^ sign) + negative;
}

}  // namespace prefixquant
