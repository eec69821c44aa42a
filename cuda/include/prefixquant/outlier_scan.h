// SPDX-License-Identifier: Apache-2.0
//
// The search for outlier tokens on the GPU: host interface.
//
// Computes, for x [rows, cols]:
//   row_max[t] = max_c |x[t, c]|, NaN where the row has one
//   median     = the lower median of row_max, NaN where there is one, and of no rows
//   is_outlier[t] = row_max[t] / median > eta, float32
// x is read once; a second launch of one CTA finds the median.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "prefixquant/row_dtype.h"

namespace prefixquant {

struct OutlierScanParams {
  const void* x = nullptr;  // [rows, cols], rows contiguous
  RowDtype dtype = RowDtype::kFloat16;
  int64_t x_stride = 0;        // elements between rows
  float* row_max = nullptr;    // [rows]
  float* median = nullptr;     // []
  bool* is_outlier = nullptr;  // [rows]
  float eta = 64.0f;
  int64_t rows = 0;
  int64_t cols = 0;
};

// Asynchronous on `stream`, no allocation, no synchronisation.
void launch_outlier_scan(const OutlierScanParams& params, cudaStream_t stream);

}  // namespace prefixquant
