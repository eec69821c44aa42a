// SPDX-License-Identifier: Apache-2.0
// TensorView: the one way a tensor enters C++. It is read off the Python object by attribute
// (data_ptr, dtype, shape, stride, is_cuda), so neither torch headers nor libtorch are needed and
// one build works with every torch. Nothing is copied or converted; the view does not own the
// memory.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "check.h"

namespace prefixquant {

enum class DType : uint8_t {
  kUInt8,
  kInt8,
  kInt32,
  kInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
  kBool
};

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";  // no operation takes it: it is here to be named in errors
    case DType::kBool:
      return "bool";
  }
  return "unknown";
}

inline int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

struct TensorView {
  static constexpr int kMaxDims = 6;

  void* ptr = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int device = -1;                          // -1: CPU, otherwise the CUDA device index
  std::array<int64_t, kMaxDims> shape{};    // elements
  std::array<int64_t, kMaxDims> strides{};  // elements, not bytes

  // Negative dimensions count from the end, as in Python.
  int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;  // as torch has it
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  template <typename T>
  T* data() const {
    return static_cast<T*>(ptr);
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
  }
};

using OptionalTensor = std::optional<TensorView>;

// The checks every operation starts with, in the order device, dtype, rank, layout. `op` and `name`
// go into the message.
struct ArgumentChecker {
  const char* op;

  void on_cpu(const TensorView& t, const char* name) const {
    PQ_CHECK(op, t.device < 0, name, ": expected a CPU tensor, got cuda:", t.device);
  }
  // `device` is that of the operation's first tensor, which this refuses where it is the CPU.
  void on_cuda(const TensorView& t, const char* name, int device) const {
    PQ_CHECK(op, device >= 0, name, ": expected a CUDA tensor, got cpu");
    PQ_CHECK(op, t.device == device, name, ": expected a tensor on cuda:", device, ", got ",
             t.device < 0 ? std::string("cpu") : "cuda:" + std::to_string(t.device));
  }
  void dtype(const TensorView& t, const char* name, DType expected) const {
    PQ_CHECK(op, t.dtype == expected, name, ": expected dtype ", dtype_name(expected), ", got ",
             dtype_name(t.dtype));
  }
  // float32, bfloat16 or float16
  void floating(const TensorView& t, const char* name) const {
    PQ_CHECK(
        op, t.dtype == DType::kFloat32 || t.dtype == DType::kBFloat16 || t.dtype == DType::kFloat16,
        name, ": expected dtype float32, bfloat16 or float16, got ", dtype_name(t.dtype));
  }
  void rank(const TensorView& t, const char* name, int expected) const {
    PQ_CHECK(op, t.ndim == expected, name, ": expected ", expected, " dimensions, got shape ",
             t.shape_text());
  }
  void contiguous(const TensorView& t, const char* name) const {
    PQ_CHECK(op, t.is_contiguous(), name, ": expected a contiguous tensor, got shape ",
             t.shape_text(), " with other strides");
  }
  void same_shape(const TensorView& t, const char* name, const TensorView& like,
                  const char* like_name) const {
    bool same = t.ndim == like.ndim;
    for (int i = 0; same && i < t.ndim; ++i) same = t.shape[i] == like.shape[i];
    PQ_CHECK(op, same, name, ": expected the shape of ", like_name, " ", like.shape_text(),
             ", got ", t.shape_text());
  }
  void size(const TensorView& t, const char* name, int dim, int64_t expected) const {
    PQ_CHECK(op, t.size(dim) == expected, name, ": expected size ", expected, " in dimension ", dim,
             ", got shape ", t.shape_text());
  }
  void aligned(const TensorView& t, const char* name, int bytes) const {
    PQ_CHECK(op, reinterpret_cast<uintptr_t>(t.ptr) % bytes == 0, name, ": expected ", bytes,
             "-byte alignment");
  }
};

}  // namespace prefixquant
