// SPDX-License-Identifier: Apache-2.0
//
// Division by a number known at launch: a multiplication and a shift on the device.
#pragma once

#include <cstdint>

namespace prefixquant {

// Exact for dividends below 2^31 (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication").
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

#ifdef __CUDACC__
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
  __device__ __forceinline__ int divide(int n, int& remainder) const {
    const int quotient = static_cast<int>(divide(static_cast<uint32_t>(n)));
    remainder = n - quotient * static_cast<int>(divisor);
    return quotient;
  }
#endif
};

}  // namespace prefixquant
