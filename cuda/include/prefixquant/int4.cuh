// SPDX-License-Identifier: Apache-2.0
//
// Unpacking of two's complement int4 weights held in the nibbles of 32-bit words.
#pragma once

#include <cstdint>

namespace prefixquant {

// An int8 lane of `nibble << 4` is 16 times the signed weight: no sign extension is needed, and the
// factor goes into a scale (exactly: it is a power of two). 16 * 8 * 128 * K fits int32 for
// K <= kMaxK16.
inline constexpr int kUnpackedW4Factor = 16;
inline constexpr int kMaxK16 = 131071;

// 16x the weights in the low nibbles of the four bytes of `word`.
__host__ __device__ __forceinline__ uint32_t unpack_low_nibbles_16x(uint32_t word) {
  return (word << 4) & 0xF0F0F0F0u;
}

// 16x the weights in the high nibbles.
__host__ __device__ __forceinline__ uint32_t unpack_high_nibbles_16x(uint32_t word) {
  return word & 0xF0F0F0F0u;
}

}  // namespace prefixquant
