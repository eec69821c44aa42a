// SPDX-License-Identifier: Apache-2.0
// q = quantize(H (x * weight) * rstd - shift), rstd = float32(1 / sqrt(mean(x^2) + eps)), H over
// the whole row. rstd comes behind H, so that the row is transformed once it is read.
#include "hadamard.h"

#include "row_pieces.h"
#include "sum_of_squares.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

PQ_INLINE void multiply_row(float* x, const float* weight, int64_t cols) {
  for_pieces(cols, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    store_piece(x + c, load_piece(x + c, n) * load_piece(weight + c, n), n);
  });
}

// q = quantize(t * rstd - shift); the block's own factor is a rounding of its own.
PQ_INLINE void finish_row(TransformedBlock t, float rstd, const float* shift, int8_t* q,
                          int64_t cols, QuantizerParams quantizer) {
  shift_quantize(q, shift, cols, quantizer, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return (load_piece(t.data + c, n) * t.factor) * rstd;
  });
}

}  // namespace

// scratch: 4 * round_up(cols, 16) floats.
void rmsnorm_hadamard_rows(const RmsnormHadamardRows& p, int64_t row_begin, int64_t row_end,
                           float* scratch) {
  const int64_t padded = (p.cols + kSumLanes - 1) / kSumLanes * kSumLanes;
  float* const x = scratch;
  float* const transformed = x + padded;
  const float* const weight = float_channels(p.weight, p.cols, transformed + padded);
  const float* const shift = float_channels(p.shift, p.cols, transformed + 2 * padded);
  with_float_type(p.x_type, p.x, [&](auto* typed) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      load_row(typed + row * p.x_stride, x, p.cols);
      // Each time: what a transform leaves in the padding is nobody's promise.
      for (int64_t c = p.cols; c < padded; ++c) x[c] = 0.0f;
      const double mean = sum_of_squares(x, padded) / static_cast<double>(p.cols);
      const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + p.eps));
      if (weight) multiply_row(x, weight, p.cols);
      const TransformedBlock t = hadamard_block(x, transformed, p.hadamard);
      finish_row(t, rstd, shift, p.q + row * p.cols, p.cols, p.quantizer);
    }
  });
}

PQ_ISA_NAMESPACE_END
