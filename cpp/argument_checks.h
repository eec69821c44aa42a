// SPDX-License-Identifier: Apache-2.0
// Checks of arguments that more than one operation makes alike.
#pragma once

#include "tensor_view.h"

namespace prefixquant {

// A contiguous CPU tensor of one dimension.
inline void check_vector(const ArgumentChecker& check, const TensorView& t, const char* name,
                         DType dtype, int64_t size) {
  check.on_cpu(t, name);
  check.dtype(t, name, dtype);
  check.rank(t, name, 1);
  check.size(t, name, 0, size);
  check.contiguous(t, name);
}

// A float32 vector a head, [heads, dim]; the device is left to the caller.
inline const float* head_vectors(const ArgumentChecker& check, const TensorView& t,
                                 const char* name, int64_t heads, int64_t dim) {
  check.dtype(t, name, DType::kFloat32);
  check.rank(t, name, 2);
  check.size(t, name, 0, heads);
  check.size(t, name, 1, dim);
  check.contiguous(t, name);
  return t.data<float>();
}

// What outlier_scan takes beside x [rows, C]; on_device(t, name) refuses a tensor of another
// device.
template <typename OnDevice>
void check_outlier_scan(const ArgumentChecker& check, int64_t rows, double eta,
                        const TensorView& row_max, const TensorView& median,
                        const TensorView& is_outlier, OnDevice&& on_device) {
  PQ_CHECK(check.op, eta > 0.0, "eta: expected a number above 0, got ", eta);
  const struct {
    const TensorView& t;
    const char* name;
    DType dtype;
    int rank;
  } outputs[] = {{row_max, "row_max", DType::kFloat32, 1},
                 {median, "median", DType::kFloat32, 0},
                 {is_outlier, "is_outlier", DType::kBool, 1}};
  for (const auto& out : outputs) {
    on_device(out.t, out.name);
    check.dtype(out.t, out.name, out.dtype);
    check.rank(out.t, out.name, out.rank);
    check.contiguous(out.t, out.name);
    if (out.rank == 1) check.size(out.t, out.name, 0, rows);
  }
}

}  // namespace prefixquant
