// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm, a Hadamard transform of the whole row and static quantization in one launch (R6): host
// interface.
//
// Computes, for each row x [C], C = pow2 * k:
//   v = x * weight                                                     float32
//   t = (H_k (x) H_pow2) v / sqrt(C)                                   float32
//   y = t * rstd - shift, rstd = float32(1 / sqrt(mean(x^2) + eps))    float32, each rounded
//   out = clamp(rint(y * (1 / scale)), qmin, qmax) as int8, NaN to 0
// The transform is linear, so the reciprocal of the norm, known last, comes behind it. The order of
// its additions is that of hadamard.h; the mean is summed in float64.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "prefixquant/hadamard.h"
#include "prefixquant/row_dtype.h"

namespace prefixquant {

// Arguments of one launch. Device pointers.
struct RmsnormHadamardParams {
  RowHadamardParams rows;        // block_size = cols, a static scale, int8 out, no `up`
  const void* weight = nullptr;  // [cols], may be nullptr
  RowDtype weight_dtype = RowDtype::kFloat16;
  const void* shift = nullptr;  // [cols], may be nullptr
  RowDtype shift_dtype = RowDtype::kFloat16;
  double eps = 0.0;
};

// Asynchronous on `stream`, no allocation, no synchronisation. On sm_90 and later the launch
// overlaps the end of the kernels before it: none of those may write the signs. Throws
// std::invalid_argument for impossible arguments (a row larger than the device's shared memory
// among them) and std::runtime_error for CUDA errors.
void launch_rmsnorm_hadamard(const RmsnormHadamardParams& params, cudaStream_t stream);

}  // namespace prefixquant
