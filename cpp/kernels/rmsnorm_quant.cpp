// SPDX-License-Identifier: Apache-2.0
// y = (x * rstd) * weight, rstd = float32(1 / sqrt(mean(x^2) + eps)), then the static quantizer.
// The squares are summed in float64 in 16 lanes (lane = column mod 16) whatever the register width,
// so every ISA adds in the same order.
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

constexpr int kSumLanes = 16;
constexpr int kHalf = kLanes / 2;  // as many float64 fit in a register
using Doubles = VectorOf<double, kHalf>::type;

// `x` is padded with zeros to a multiple of kSumLanes.
double sum_of_squares(const float* x, int64_t padded) {
  Doubles sum[kSumLanes / kHalf] = {};
  for (int64_t c = 0; c < padded; c += kSumLanes) {
    for (int i = 0; i < kSumLanes / kHalf; ++i) {
      const auto v = __builtin_convertvector(load<Floats<kHalf>>(x + c + i * kHalf), Doubles);
      sum[i] += v * v;
    }
  }
  double lanes[kSumLanes];
  __builtin_memcpy(lanes, sum, sizeof(lanes));
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <typename W>
void normalize_quantize(const float* x, const W* weight, float rstd, int8_t* q, int64_t cols,
                        const QuantizerParams& quantizer) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    Floats<kLanes> y = load_float(x + c) * rstd;
    if (weight) y *= load_float(weight + c);
    store_int8(q + c, quantize_lanes(y, quantizer));
  }
  if (c < cols) {
    Floats<kLanes> y = load_float_tail(x + c, cols - c) * rstd;
    if (weight) y *= load_float_tail(weight + c, cols - c);
    store_int8_tail(q + c, quantize_lanes(y, quantizer), cols - c);
  }
}

}  // namespace

// scratch: cols floats rounded up to a multiple of 16.
void rmsnorm_quantize_rows(const RmsnormQuantizeRows& p, int64_t row_begin, int64_t row_end,
                           float* scratch) {
  const int64_t padded = (p.cols + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (int64_t c = p.cols; c < padded; ++c) scratch[c] = 0.0f;
  with_float_type(p.x_type, p.x, [&](auto* x) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      load_row(x + row * p.x_stride, scratch, p.cols);
      const double mean = sum_of_squares(scratch, padded) / static_cast<double>(p.cols);
      const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + p.eps));
      with_float_type(p.weight_type, p.weight, [&](auto* weight) {
        normalize_quantize(scratch, weight, rstd, p.q + row * p.cols, p.cols, p.quantizer);
      });
    }
  });
}

PQ_ISA_NAMESPACE_END
