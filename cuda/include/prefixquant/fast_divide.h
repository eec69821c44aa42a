// SPDX-License-Identifier: Apache-2.0
// Division by a number that only the host knows, as a multiplication: an inlined 32-bit division
// is about 25 instructions, which tells in a kernel that runs for ten microseconds.
#pragma once

#include <cstdint>

namespace prefixquant {

// n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31, exactly: with s = ceil(log2(divisor)) and
// m = ceil(2^(31 + s) / divisor), n m / 2^(31 + s) is too large by less than n / 2^31 < 1 /
// divisor.
struct FastDivide {
  uint32_t multiplier = 1u << 31;
  uint32_t shift = 0;
  int32_t divisor = 1;

  FastDivide() = default;
  explicit FastDivide(int32_t d) : divisor(d) {
    while ((int64_t{1} << shift) < d) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    multiplier = static_cast<uint32_t>((power + d - 1) / d);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>((static_cast<uint64_t>(n) * multiplier) >> 31 >> shift);
  }
  __device__ __forceinline__ int divide(int n, int& remainder) const {
    const int quotient = divide(n);
    remainder = n - quotient * divisor;
    return quotient;
  }
#endif
};

}  // namespace prefixquant
