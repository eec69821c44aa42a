// SPDX-License-Identifier: Apache-2.0
//
// The levels of compand.h on registers, four bytes at a time; the same bits as
// cpp/kernels/compand.h.
#pragma once

#include <cstdint>

namespace prefixquant {

// The levels are kCompandFirst, kCompandFirst + the first step and so on, and their negatives. A
// step is taken at magnitudes of kCompandFrom and more: half-way, rounded up.
inline constexpr uint32_t kCompandFirst = 5;
inline constexpr int kCompandSteps = 7;
__device__ constexpr uint32_t kCompandStep[kCompandSteps] = {9, 11, 13, 15, 19, 23, 31};
__device__ constexpr uint32_t kCompandFrom[kCompandSteps] = {10, 20, 32, 46, 63, 84, 111};

// Four int8 to their levels. No sum or difference below carries from one byte into the next.
__device__ __forceinline__ uint32_t compand4(uint32_t q) {
  constexpr uint32_t kOnes = 0x01010101u, kHigh = 0x80808080u;
  const uint32_t negative = (q & kHigh) >> 7;  // 1 where a byte is below 0
  const uint32_t sign = negative * 0xFFu;
  uint32_t size = (q ^ sign) + negative;
  size -= (size & kHigh) >> 7;  // 128 to 127
  const uint32_t marked = size | kHigh;
  uint32_t level = kOnes * kCompandFirst;
#pragma unroll
  for (int i = 0; i < kCompandSteps; ++i) {
    const uint32_t reached = (marked - kOnes * kCompandFrom[i]) & kHigh;  // where size >= from
    level += (reached >> 7) * kCompandStep[i];
  }
  return (level ^ sign) + negative;
}

}  // namespace prefixquant
