// SPDX-License-Identifier: Apache-2.0
// y = (x * rstd) * weight, rstd = float32(1 / sqrt(mean(x^2) + eps)), then rounded to x's dtype or
// quantized with a static scale (less a shift, where there is one) or the row's own; before that,
// where asked for, x = residual + x, rounded and written back to the residual.
#include "quantize_dynamic.h"

#include <type_traits>

#include "row_pieces.h"
#include "sum_of_squares.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

// y[c] = x[c] * rstd (* weight[c]) in pieces, handed to `use`(c, n, y).
template <typename W, typename Use>
PQ_INLINE void normalize(const float* x, const W* weight, float rstd, int64_t cols, Use&& use) {
  for_pieces(cols, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    use(c, n, (load_piece(x + c, n) * rstd) * load_piece(weight + c, n));
  });
}

template <typename Use>
PQ_INLINE void normalize(const float* x, float rstd, int64_t cols, Use&& use) {
  for_pieces(
      cols, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA { use(c, n, load_piece(x + c, n) * rstd); });
}

template <typename W>
PQ_INLINE void normalize_quantize(const float* x, const W* weight, float rstd, const float* shift,
                                  int8_t* q, int64_t cols, QuantizerParams quantizer) {
  shift_quantize(q, shift, cols, quantizer, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return (load_piece(x + c, n) * rstd) * load_piece(weight + c, n);
  });
}

PQ_INLINE void normalize_quantize(const float* x, float rstd, const float* shift, int8_t* q,
                                  int64_t cols, QuantizerParams quantizer) {
  shift_quantize(q, shift, cols, quantizer, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return load_piece(x + c, n) * rstd;
  });
}

// residual = residual + x, rounded to T.
template <typename T>
PQ_INLINE void add_row(T* residual, const T* x, int64_t cols) {
  for_pieces(cols, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    store_piece(residual + c, load_piece(residual + c, n) + load_piece(x + c, n), n);
  });
}

// Writes the normalized row in the form that the operation wants.
template <typename T, typename Normalize, typename NormalizeQuantize>
PQ_INLINE void finish_row(const RmsnormRows& p, int64_t row, const T*, float* scratch,
                          int8_t* levels, Normalize&& normalize_row,
                          NormalizeQuantize&& quantize_normalized) {
  if (p.output == RowOutput::kFloat) {
    T* y = static_cast<T*>(p.y) + row * p.cols;
    normalize_row([=](int64_t c, int64_t n, Floats<kLanes> v)
                      PQ_INLINE_LAMBDA { store_piece(y + c, v, n); });
    return;
  }
  int8_t* q = p.output == RowOutput::kPacked ? levels : static_cast<int8_t*>(p.y) + row * p.cols;
  if (p.row_scale) {
    normalize_row([=](int64_t c, int64_t n, Floats<kLanes> v)
                      PQ_INLINE_LAMBDA { store_piece(scratch + c, v, n); });
    p.row_scale[row] = quantize_row_dynamic(scratch, q, p.cols, p.quantizer);
  } else {
    quantize_normalized(q);
  }
  if (p.output == RowOutput::kPacked) {
    pack_row(q, static_cast<uint8_t*>(p.y) + row * (p.cols / 2), p.cols);
  }
}

}  // namespace

// scratch: 3 * round_up(cols, 16) floats and cols bytes.
void rmsnorm_rows(const RmsnormRows& p, int64_t row_begin, int64_t row_end, float* scratch) {
  const int64_t padded = (p.cols + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (int64_t c = p.cols; c < padded; ++c) scratch[c] = 0.0f;
  float* const normalized = scratch + padded;
  const float* const shift = float_channels(p.shift, p.cols, normalized + padded);
  int8_t* const levels = reinterpret_cast<int8_t*>(normalized + 2 * padded);
  // float32 rows of a whole number of lanes are read where they are.
  const bool in_place = p.x_type == FloatType::kFloat32 && padded == p.cols;
  for (int64_t row = row_begin; row < row_end; ++row) {
    with_float_type(p.x_type, p.x, [&](auto* typed) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
      const T* from = typed + row * p.x_stride;
      if (p.residual) {
        T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
        add_row(residual, from, p.cols);
        from = residual;
      }
      const float* x = scratch;
      if (in_place) {
        x = reinterpret_cast<const float*>(from);
      } else {
        load_row(from, scratch, p.cols);
      }
      const double mean = sum_of_squares(x, padded) / static_cast<double>(p.cols);
      const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean + p.eps));
      if (!p.weight.data) {
        finish_row(
            p, row, from, normalized, levels,
            [=](auto use) PQ_INLINE_LAMBDA { normalize(x, rstd, p.cols, use); },
            [=](int8_t* q)
                PQ_INLINE_LAMBDA { normalize_quantize(x, rstd, shift, q, p.cols, p.quantizer); });
        return;
      }
      with_float_type(p.weight.type, p.weight.data, [&](auto* weight) {
        finish_row(
            p, row, from, normalized, levels,
            [=](auto use) PQ_INLINE_LAMBDA { normalize(x, weight, rstd, p.cols, use); },
            [=](int8_t* q) PQ_INLINE_LAMBDA {
              normalize_quantize(x, weight, rstd, shift, q, p.cols, p.quantizer);
            });
      });
    });
  }
}

PQ_ISA_NAMESPACE_END
