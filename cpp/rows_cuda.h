// SPDX-License-Identifier: Apache-2.0
// What the row-wise CUDA operations share on the host side: the checks of rows.h for tensors on one
// device, in the order device, dtype, layout, shape.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "prefixquant/row_dtype.h"
#include "rows.h"

namespace prefixquant {

inline cudaStream_t as_cuda_stream(uintptr_t stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

inline RowDtype row_dtype(FloatType type) {
  switch (type) {
    case FloatType::kFloat32:
      return RowDtype::kFloat32;
    case FloatType::kBFloat16:
      return RowDtype::kBFloat16;
    default:
      return RowDtype::kFloat16;
  }
}

// The device of a launch is that of its first tensor.
inline int cuda_device_of(const ArgumentChecker& check, const TensorView& t, const char* name) {
  PQ_CHECK(check.op, t.device >= 0, name, ": expected a CUDA tensor, got a CPU tensor");
  return t.device;
}

struct CudaRowInput {
  RowView rows;
  RowDtype dtype;

  CudaRowInput(const ArgumentChecker& check, const TensorView& t, const char* name, int device)
      : rows((check.on_cuda(t, name, device), check.floating(t, name), check), t, name),
        dtype(row_dtype(float_type(check, t, name))) {}
};

// The bounds of the levels.
struct LevelBounds {
  float qmin, qmax;

  LevelBounds(const ArgumentChecker& check, int64_t bits) {
    const QuantizerParams bounds = quantizer_bounds(check, bits);
    qmin = bounds.qmin;
    qmax = bounds.qmax;
  }
};

// `scale` float32 0-dim; it stays in device memory.
inline const float* checked_cuda_scale(const ArgumentChecker& check, const TensorView& scale,
                                       int device) {
  check.on_cuda(scale, "scale", device);
  check.dtype(scale, "scale", DType::kFloat32);
  check.rank(scale, "scale", 0);
  return scale.data<float>();
}

inline float* checked_cuda_row_scales(const ArgumentChecker& check, const TensorView& scale,
                                      int64_t rows, int device) {
  check.on_cuda(scale, "scale", device);
  check.dtype(scale, "scale", DType::kFloat32);
  check.rank(scale, "scale", 1);
  check.size(scale, "scale", 0, rows);
  check.contiguous(scale, "scale");
  return scale.data<float>();
}

// A vector [cols] of any floating dtype, or nullptr where it is absent.
inline const void* checked_cuda_channels(const ArgumentChecker& check, const OptionalTensor& t,
                                         const char* name, int64_t cols, int device,
                                         RowDtype& dtype) {
  if (!t) return nullptr;
  check.on_cuda(*t, name, device);
  dtype = row_dtype(float_type(check, *t, name));
  check.rank(*t, name, 1);
  check.size(*t, name, 0, cols);
  check.contiguous(*t, name);
  return t->ptr;
}

// The sign matrix [k, k] of transforms of `size`, or nullptr and k = 1. Its values are not looked
// at. Errors in the size begin with `expected`.
inline const int8_t* checked_cuda_signs(const ArgumentChecker& check, const OptionalTensor& signs,
                                        int64_t size, const std::string& expected, int device,
                                        int64_t& k) {
  k = 1;
  const int8_t* data = nullptr;
  if (signs) {
    check.on_cuda(*signs, "signs", device);
    check.dtype(*signs, "signs", DType::kInt8);
    check.rank(*signs, "signs", 2);
    check.contiguous(*signs, "signs");
    k = signs->size(0);
    PQ_CHECK(check.op, signs->size(1) == k && k % 4 == 0 && k > 0,
             "signs: expected a square matrix of a size that 4 divides, got shape ",
             signs->shape_text());
    data = signs->data<int8_t>();
  }
  const int64_t pow2 = size / k;
  PQ_CHECK(check.op, pow2 * k == size && pow2 > 0 && (pow2 & (pow2 - 1)) == 0, expected,
           " a power of two times ", k, " (the size of signs), got ", size);
  return data;
}

// A contiguous result of `like`'s shape.
inline void check_cuda_result(const ArgumentChecker& check, const TensorView& t, const char* name,
                              DType dtype, const TensorView& like, const char* like_name,
                              int device) {
  check.on_cuda(t, name, device);
  check.dtype(t, name, dtype);
  check.contiguous(t, name);
  check.same_shape(t, name, like, like_name);
}

}  // namespace prefixquant
