// SPDX-License-Identifier: Apache-2.0
// rmsnorm_hadamard_quantize on CUDA: the checks of rmsnorm_hadamard.cpp, then one launch. The
// values of the signs lie in device memory and are not looked at here: the kernels take any matrix
// of 1 and -1.
#include "prefixquant/rmsnorm_hadamard.h"

#include "ops_cuda.h"
#include "rows_cuda.h"

namespace prefixquant {

void rmsnorm_hadamard_quantize_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                                    const OptionalTensor& signs, const TensorView& scale,
                                    int64_t bits, const OptionalTensor& shift, const TensorView& q,
                                    uintptr_t stream) {
  const ArgumentChecker check{"rmsnorm_hadamard_quantize"};
  const int device = cuda_device_of(check, x, "x");
  const CudaRowInput input(check, x, "x", device);
  RmsnormHadamardParams params;
  RowHadamardParams& rows = params.rows;
  rows.x = x.ptr;
  rows.dtype = input.dtype;
  rows.x_stride = input.rows.stride;
  rows.rows = input.rows.rows;
  rows.cols = rows.block_size = input.rows.cols;
  params.weight =
      checked_cuda_channels(check, weight, "weight", rows.cols, device, params.weight_dtype);
  params.shift =
      checked_cuda_channels(check, shift, "shift", rows.cols, device, params.shift_dtype);
  PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
  params.eps = eps;
  rows.signs = checked_cuda_signs(check, signs, rows.cols, "x: expected a last dimension of",
                                  device, rows.k);
  rows.scaling = RowScale::kStatic;
  rows.scale = checked_cuda_scale(check, scale, device);
  const LevelBounds bounds(check, bits);
  rows.qmin = bounds.qmin;
  rows.qmax = bounds.qmax;
  check_cuda_result(check, q, "q", DType::kInt8, x, "x", device);
  rows.out = q.ptr;
  launch_rmsnorm_hadamard(params, as_cuda_stream(stream));
}

}  // namespace prefixquant
