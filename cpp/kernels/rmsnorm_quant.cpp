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

// sum + v * v. The square of a float32 is exact in float64, so the fused form rounds alike.
PQ_INLINE Doubles add_square(Doubles sum, Doubles v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)v, (__m512d)v, (__m512d)sum);
#else
  return sum + v * v;
#endif
}

// `x` is padded with zeros to a multiple of kSumLanes.
double sum_of_squares(const float* x, int64_t padded) {
  Doubles sum[kSumLanes / kHalf] = {};
  for (int64_t c = 0; c < padded; c += kSumLanes) {
    for (int i = 0; i < kSumLanes / kHalf; ++i) {
      const auto v = __builtin_convertvector(load<Floats<kHalf>>(x + c + i * kHalf), Doubles);
      sum[i] = add_square(sum[i], v);
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
PQ_INLINE void normalize_quantize(const float* x, const W* weight, float rstd, int8_t* q,
                                  int64_t cols, QuantizerParams quantizer) {
  quantize_each(q, cols, quantizer, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    if (n == kLanes) return (load_float(x + c) * rstd) * load_float(weight + c);
    return (load_float_tail(x + c, n) * rstd) * load_float_tail(weight + c, n);
  });
}

PQ_INLINE void normalize_quantize(const float* x, float rstd, int8_t* q, int64_t cols,
                                  QuantizerParams quantizer) {
  quantize_each(q, cols, quantizer, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return (n == kLanes ? load_float(x + c) : load_float_tail(x + c, n)) * rstd;
  });
}

}  // namespace

// scratch: cols floats rounded up to a multiple of 16.
void rmsnorm_quantize_rows(const RmsnormQuantizeRows& p, int64_t row_begin, int64_t row_end,
                           float* scratch) {
  const int64_t padded = (p.cols + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (int64_t c = p.cols; c < padded; ++c) scratch[c] = 0.0f;
  // float32 rows of a whole number of lanes are read where they are.
  const bool in_place = p.x_type == FloatType::kFloat32 && padded == p.cols;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* x = scratch;
    if (in_place) {
      x = static_cast<const float*>(p.x) + row * p.x_stride;
    } else {
      with_float_type(p.x_type, p.x,
                      [&](auto* from) { load_row(from + row * p.x_stride, scratch, p.cols); });
    }
    const double mean = sum_of_squares(x, padded) / static_cast<double>(p.cols);
    const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + p.eps));
    int8_t* q = p.q + row * p.cols;
    if (!p.weight) {
      normalize_quantize(x, rstd, q, p.cols, p.quantizer);
    } else {
      with_float_type(p.weight_type, p.weight, [&](auto* weight) {
        normalize_quantize(x, weight, rstd, q, p.cols, p.quantizer);
      });
    }
  }
}

PQ_ISA_NAMESPACE_END
