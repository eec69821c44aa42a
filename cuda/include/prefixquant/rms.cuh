// SPDX-License-Identifier: Apache-2.0
//
// The root mean square of a row, and its channels' weights and shifts one at a time: what the
// kernels with an RMSNorm share.
#pragma once

#include <cstdint>

#include "prefixquant/row_dtype.h"
#include "prefixquant/row_vector.cuh"

namespace prefixquant {

// sum + v^2, the square exact. A conversion to float64 takes four times as long as an fma, so the
// factors |v| 2^-896 and |v| 2^896 are put together from bits: those of a float32, three places
// further right, are a float64 whose exponent is biased by 896 less. 0 stays 0, and an infinity or
// a NaN is one in the second factor. The square of a subnormal v comes out as some number below
// 2^-250, which no sum with eps in it notices.
__device__ __forceinline__ double add_square(double sum, float v) {
  const uint32_t bits = __float_as_uint(v) & 0x7FFFFFFFu;
  const int high = static_cast<int>(bits >> 3), low = static_cast<int>(bits << 29);
  return fma(__hiloint2double(high, low), __hiloint2double(high + (2 * 896 << 20), low), sum);
}

// float32(1 / sqrt(mean + eps)). The product with 1 / cols and rsqrt are within an ulp of float64
// each, so that the float32 differs from the correctly rounded one about once in 2^27.
__device__ __forceinline__ float reciprocal_rms(double sum_of_squares, double inv_cols,
                                                double eps) {
  return static_cast<float>(rsqrt(fma(sum_of_squares, inv_cols, eps)));
}

// Channel c of a vector of `dtype`.
__device__ __forceinline__ float channel(const void* channels, RowDtype dtype, int64_t c) {
  switch (dtype) {
    case RowDtype::kFloat32:
      return static_cast<const float*>(channels)[c];
    case RowDtype::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(channels)[c]);
    case RowDtype::kFloat16:
      return to_float(static_cast<const __half*>(channels)[c]);
  }
  return 0.0f;
}

}  // namespace prefixquant
