// SPDX-License-Identifier: Apache-2.0
// What the row-wise operations share on the host side: a tensor as rows, the quantizer's constants,
// the plan of a Hadamard transform, and the split of the rows among threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "argument_checks.h"
#include "gemm_params.h"  // thread_scratch
#include "kernels/params.h"
#include "tensor_view.h"

namespace prefixquant {

// A tensor [..., cols] whose leading dimensions share one stride.
struct RowView {
  int64_t rows = 1;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from row to row

  RowView(const ArgumentChecker& check, const TensorView& t, const char* name) {
    PQ_CHECK(check.op, t.ndim >= 1 && t.size(-1) >= 1, name,
             ": expected at least one dimension and a last one of size 1 or more, got shape ",
             t.shape_text());
    cols = t.size(-1);
    bool regular = cols == 1 || t.stride(-1) == 1;
    for (int i = t.ndim - 2; i >= 0; --i) {
      if (t.shape[i] == 1) continue;
      if (rows == 1) stride = t.strides[i];
      regular = regular && t.strides[i] == rows * stride;
      rows *= t.shape[i];
    }
    PQ_CHECK(check.op, regular || rows == 0, name,
             ": expected a contiguous last dimension and rows at one distance, got shape ",
             t.shape_text(), " with other strides");
  }
};

inline FloatType float_type(const ArgumentChecker& check, const TensorView& t, const char* name) {
  check.floating(t, name);
  if (t.dtype == DType::kFloat32) return FloatType::kFloat32;
  return t.dtype == DType::kBFloat16 ? FloatType::kBFloat16 : FloatType::kFloat16;
}

// A floating vector with an element for each of cols channels, or none.
inline ChannelVector checked_channels(const ArgumentChecker& check, const OptionalTensor& t,
                                      const char* name, int64_t cols) {
  if (!t) return {nullptr, FloatType::kFloat32};
  check.on_cpu(*t, name);
  const FloatType type = float_type(check, *t, name);
  check_vector(check, *t, name, t->dtype, cols);
  return {t->ptr, type};
}

// A float32 vector a head, [heads, dim], or none.
inline const float* head_shift(const ArgumentChecker& check, const OptionalTensor& t,
                               const char* name, int64_t heads, int64_t dim) {
  if (!t) return nullptr;
  check.on_cpu(*t, name);
  return head_vectors(check, *t, name, heads, dim);
}

// Shape, dtype and layout of two values a byte; the device is left to the caller.
inline void check_packed(const ArgumentChecker& check, const TensorView& q, const TensorView& like,
                         const char* like_name, int64_t bits) {
  PQ_CHECK(check.op, bits <= 4, "bits: expected 2 to 4 for a packed result, got ", bits);
  check.dtype(q, "q", DType::kUInt8);
  check.contiguous(q, "q");
  bool fits = q.ndim == like.ndim && like.size(-1) % 2 == 0 && 2 * q.size(-1) == like.size(-1);
  for (int i = 0; fits && i + 1 < like.ndim; ++i) fits = q.shape[i] == like.shape[i];
  PQ_CHECK(check.op, fits, "q: expected the shape of ", like_name, " ", like.shape_text(),
           " with half of an even last dimension, got ", q.shape_text());
}

// The int8 result of quantizing `like`.
inline void check_quantized(const ArgumentChecker& check, const TensorView& q,
                            const TensorView& like, const char* like_name) {
  check.on_cpu(q, "q");
  check.dtype(q, "q", DType::kInt8);
  check.contiguous(q, "q");
  check.same_shape(q, "q", like, like_name);
}

// The same, or packed to uint8 [.., C/2]; its dtype says which.
inline RowOutput check_quantized_or_packed(const ArgumentChecker& check, const TensorView& q,
                                           const TensorView& like, const char* like_name,
                                           int64_t bits) {
  if (q.dtype != DType::kUInt8) {
    check_quantized(check, q, like, like_name);
    return RowOutput::kInt8;
  }
  check_packed(check, q, like, like_name, bits);
  check.on_cpu(q, "q");
  return RowOutput::kPacked;
}

// The scales of a dynamic quantization, one a row.
inline float* checked_row_scales(const ArgumentChecker& check, const TensorView& scale,
                                 int64_t rows) {
  check.on_cpu(scale, "scale");
  check.dtype(scale, "scale", DType::kFloat32);
  check.rank(scale, "scale", 1);
  check.size(scale, "scale", 0, rows);
  check.contiguous(scale, "scale");
  return scale.data<float>();
}

// The bounds of a quantizer of 2..8 bits, its scale left at 1.
inline QuantizerParams quantizer_bounds(const ArgumentChecker& check, int64_t bits) {
  PQ_CHECK(check.op, bits >= 2 && bits <= 8, "bits: expected 2 to 8, got ", bits);
  const float qmax = static_cast<float>((1 << (bits - 1)) - 1);
  return {1.0f, -qmax - 1.0f, qmax};
}

// `scale` float32 0-dim, bits 2..8.
inline QuantizerParams quantizer_params(const ArgumentChecker& check, const TensorView& scale,
                                        int64_t bits) {
  check.on_cpu(scale, "scale");
  check.dtype(scale, "scale", DType::kFloat32);
  check.rank(scale, "scale", 0);
  QuantizerParams quantizer = quantizer_bounds(check, bits);
  quantizer.inv_scale = 1.0f / *scale.data<float>();
  return quantizer;
}

// Checks (signs, block_size) and turns the sign matrix into the picks of HadamardParams. They live
// in the calling thread's scratch until its next plan. Errors in the size begin with `expected`.
inline HadamardParams hadamard_params(const ArgumentChecker& check, const OptionalTensor& signs,
                                      int64_t block_size,
                                      const char* expected = "block_size: expected") {
  constexpr int64_t kGroup = 4;
  PQ_CHECK(check.op, block_size >= 1, expected, " 1 or more, got ", block_size);
  int64_t k = 1;
  uint8_t* picks = nullptr;
  if (signs) {
    check.on_cpu(*signs, "signs");
    check.dtype(*signs, "signs", DType::kInt8);
    check.rank(*signs, "signs", 2);
    check.contiguous(*signs, "signs");
    k = signs->size(0);
    PQ_CHECK(check.op, signs->size(1) == k && k % kGroup == 0 && k > 0,
             "signs: expected a square matrix of a size that 4 divides, got shape ",
             signs->shape_text());
    picks = static_cast<uint8_t*>(thread_scratch(ScratchSlot::kPanel, k * k / kGroup));
    const int8_t* source = signs->data<int8_t>();
    bool only_signs = true;
    for (int64_t i = 0; i < k; ++i) {
      uint8_t* row = picks + i / kGroup * k + i % kGroup;
      for (int64_t j = 0; j < k; j += kGroup) {
        uint8_t pick = 0;
        for (int64_t b = 0; b < kGroup; ++b) {
          const int8_t sign = source[i * k + j + b];
          only_signs = only_signs && (sign == 1 || sign == -1);
          pick |= static_cast<uint8_t>((sign < 0) << b);
        }
        row[j] = pick;
      }
    }
    PQ_CHECK(check.op, only_signs, "signs: expected values 1 and -1");
  }
  const int64_t pow2 = block_size / k;
  PQ_CHECK(check.op, pow2 * k == block_size && pow2 > 0 && (pow2 & (pow2 - 1)) == 0, expected,
           " a power of two times ", k, " (the size of signs), got ", block_size);
  return {block_size, pow2, k, picks,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(block_size)))};
}

// Calls run(row_begin, row_end, scratch) on contiguous parts of the rows, one a thread; `scratch`
// has room for scratch_floats and belongs to the thread. `elements_per_row` weighs the work: below
// kSerialElements (20 to 40 us on one AVX-512 core, at the measured 0.07 to 0.15 ns an element) the
// rows are done here, because a parallel region costs 2 to 10 us, and much more on a busy machine.
template <typename Run>
void for_row_ranges(int64_t rows, int64_t elements_per_row, int64_t scratch_floats, Run&& run) {
  constexpr int64_t kSerialElements = 1 << 18;
  const auto scratch = [&] {
    if (scratch_floats == 0) return static_cast<float*>(nullptr);
    const int64_t bytes = scratch_floats * static_cast<int64_t>(sizeof(float));
    return static_cast<float*>(thread_scratch(ScratchSlot::kRowData, bytes));
  };
  if (rows <= 0) return;
  if (rows < 2 || rows * elements_per_row < kSerialElements || omp_get_max_threads() == 1) {
    run(int64_t{0}, rows, scratch());
    return;
  }
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
    if (begin < end) run(begin, end, scratch());
  }
}

}  // namespace prefixquant
