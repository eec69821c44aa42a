// SPDX-License-Identifier: Apache-2.0
// row_max[t] = max_c |x[t, c]|.
// Without the sign bit the bit patterns of a float order as the values do, with infinity above
// every number and NaN above infinity: an integer maximum is exact and lets a NaN through, as
// torch.amax.
#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

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

}  // namespace

void abs_max_rows(const AbsMaxRows& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float& result = p.row_max[row];
    if (p.x_type == FloatType::kFloat32) {
      const float* x = static_cast<const float*>(p.x) + row * p.x_stride;
      result = bits_float(max_magnitude<int32_t, kLanes>(x, p.cols, 0x7FFFFFFF));
    } else {
      const int16_t* x = static_cast<const int16_t*>(p.x) + row * p.x_stride;
      const uint16_t bits = max_magnitude<int16_t, 2 * kLanes>(x, p.cols, 0x7FFF);
      result =
          p.x_type == FloatType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
    }
  }
}

PQ_ISA_NAMESPACE_END
