// SPDX-License-Identifier: Apache-2.0
//
// The k part of a Hadamard transform for 60 < k < 512, on integers: cpp/kernels/hadamard.h defines
// it. X = rint(x 2^(22-e)) has 24 bits with its sign; k of them add up in int32, exactly, in any
// order.
#pragma once

#include <cfloat>
#include <cstdint>

#include "prefixquant/hadamard.h"

namespace prefixquant {

// What a block is multiplied by before its values are rounded, and its sums at the end.
struct IntegerScale {
  float to_integer;  // 2^(22-e)
  float factor;      // 2^(e-22) norm; NaN where the block is not finite
};

// largest: the bits of the block's largest magnitude, NaN on top.
__device__ __forceinline__ IntegerScale integer_scale(uint32_t largest, float norm) {
  const int e = max(static_cast<int>(largest >> 23) - 126, -90);
  const float back = __uint_as_float(static_cast<uint32_t>(127 - 22 + e) << 23);
  return {__uint_as_float(static_cast<uint32_t>(127 + 22 - e) << 23),
          largest >= 0x7F800000u ? __uint_as_float(0x7FC00000u) : __fmul_rn(back, norm)};
}

// X + 2^22 in the low 24 bits: the sum with 1.5 * 2^23 rounds half to even.
__device__ __forceinline__ uint32_t offset_integer(float x, const IntegerScale& scale) {
  return __float_as_uint(__fmaf_rn(x, scale.to_integer, 12582912.0f));
}
__device__ __forceinline__ int32_t integer_of(float x, const IntegerScale& scale) {
  return static_cast<int32_t>(offset_integer(x, scale) - 0x4B400000u);
}

__device__ __forceinline__ float finished_sum(int32_t sum, const IntegerScale& scale) {
  return __fmul_rn(__int2float_rn(sum), scale.factor);
}

// For levels: blocks that are not finite have 0 everywhere. With number_scale() no product is a
// NaN.
__device__ __forceinline__ IntegerScale scale_for_levels(const IntegerScale& scale) {
  return {scale.to_integer, scale.factor == scale.factor ? scale.factor : 0.0f};
}
// The same levels for every result of finished_sum, which is 0 or more than 2^-120: of a NaN 0, of
// an infinity the bounds and 0.
__device__ __forceinline__ float number_scale(float inv_scale) {
  return inv_scale == inv_scale ? fminf(fmaxf(inv_scale, -FLT_MAX), FLT_MAX) : 0.0f;
}

// Whether |sum| * factor * |inv_scale| is below `most` for all sums of k integers, rounded or not.
__device__ __forceinline__ bool sums_are_bounded(int k, const IntegerScale& scale, float inv_scale,
                                                 float most) {
  return static_cast<float>(k) * 4194304.0f * scale.factor * fabsf(inv_scale) < 0.999f * most;
}

// The larger magnitude, NaN if there is one.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
  return result;
}

}  // namespace prefixquant
