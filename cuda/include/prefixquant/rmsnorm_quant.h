// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm and quantization of rows on the GPU: host interface.
//
// Computes, for each row x [C]:
//   x = round(residual + x), written back to the residual      where there is a residual
//   y = (x * rstd) * weight, rstd = float32(1 / sqrt(mean(x^2) + eps))      where kNormalize
//   y = y - shift                              where there is a shift, before a static scale only
//   out = y rounded to x's dtype, or clamp(rint(y * (1 / scale)), qmin, qmax) as int8 or nibbles
// The mean is summed in float64, everything else is float32, each operation rounded. The scale is
// one float in device memory, or clip * max|y| / qmax of the row (1 where that is 0), written to
// row_scale. NaN quantizes to 0.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "prefixquant/row_dtype.h"

namespace prefixquant {

// Arguments of one launch. Device pointers; strides in elements.
struct RowQuantParams {
  const void* x = nullptr;                     // [rows, cols], rows contiguous
  RowDtype dtype = RowDtype::kFloat16;         // of x, of the residual and of a float output
  int64_t x_stride = 0;                        // between rows
  void* residual = nullptr;                    // [rows, cols], may be nullptr
  int64_t residual_stride = 0;                 //
  bool normalize = false;                      // false: y = x
  const void* weight = nullptr;                // [cols], may be nullptr
  RowDtype weight_dtype = RowDtype::kFloat16;  //
  const void* shift = nullptr;                 // [cols], may be nullptr
  RowDtype shift_dtype = RowDtype::kFloat16;   //
  double eps = 0.0;                            //
  void* out = nullptr;                   // [rows, cols] contiguous, or [rows, cols / 2] packed
  RowResult output = RowResult::kInt8;   //
  RowScale scaling = RowScale::kStatic;  // kNone with a float output
  const float* scale = nullptr;          // [] for kStatic
  float* row_scale = nullptr;            // [rows] for kDynamic
  float clip = 1.0f;                     // for kDynamic
  float qmin = -8.0f;                    //
  float qmax = 7.0f;                     //
  int64_t rows = 0;
  int64_t cols = 0;
};

// Asynchronous on `stream`, no allocation, no synchronisation. On sm_90 and later the launch
// overlaps the end of the kernels before it (programmatic dependent launch): none of those may
// write the weight and the shift. Throws std::invalid_argument for impossible arguments and
// std::runtime_error for CUDA errors.
void launch_row_quant(const RowQuantParams& params, cudaStream_t stream);

}  // namespace prefixquant
