// SPDX-License-Identifier: Apache-2.0
// rmsnorm, rmsnorm_quantize(_dynamic), add_rmsnorm_quantize, quantize_static and quantize_dynamic
// on CUDA: the checks of rmsnorm_quant.cpp, quantize.cpp and quantize_dynamic.cpp, then one launch.
#include "prefixquant/rmsnorm_quant.h"

#include "ops_cuda.h"
#include "rows_cuda.h"

namespace prefixquant {
namespace {

// Input, device and norm of a launch.
struct Plan {
  ArgumentChecker check;
  int device;
  RowQuantParams params;

  Plan(const char* op, const TensorView& x) : check{op}, device(cuda_device_of(check, x, "x")) {
    const CudaRowInput input(check, x, "x", device);
    params.x = x.ptr;
    params.dtype = input.dtype;
    params.x_stride = input.rows.stride;
    params.rows = input.rows.rows;
    params.cols = input.rows.cols;
  }

  void normalize(const OptionalTensor& weight, double eps, const OptionalTensor& shift = {}) {
    params.normalize = true;
    params.weight =
        checked_cuda_channels(check, weight, "weight", params.cols, device, params.weight_dtype);
    params.shift =
        checked_cuda_channels(check, shift, "shift", params.cols, device, params.shift_dtype);
    PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
    params.eps = eps;
  }

  void bounds(int64_t bits) {
    const LevelBounds bounds(check, bits);
    params.qmin = bounds.qmin;
    params.qmax = bounds.qmax;
  }

  void static_scale(const TensorView& scale, int64_t bits) {
    params.scaling = RowScale::kStatic;
    params.scale = checked_cuda_scale(check, scale, device);
    bounds(bits);
  }

  void dynamic_scale(const TensorView& scale, int64_t bits) {
    params.scaling = RowScale::kDynamic;
    bounds(bits);
    params.row_scale = checked_cuda_row_scales(check, scale, params.rows, device);
  }

  // int8, or uint8 for packed levels where that is allowed
  void levels(const TensorView& q, const TensorView& x, int64_t bits, bool allow_packed) {
    if (allow_packed && q.dtype == DType::kUInt8) {
      check.on_cuda(q, "q", device);
      check_packed(check, q, x, "x", bits);
      params.output = RowResult::kPacked;
    } else {
      check_cuda_result(check, q, "q", DType::kInt8, x, "x", device);
      params.output = RowResult::kInt8;
    }
    params.out = q.ptr;
  }

  void launch(uintptr_t stream) const { launch_row_quant(params, as_cuda_stream(stream)); }
};

}  // namespace

void quantize_static_cuda(const TensorView& x, const TensorView& scale, int64_t bits,
                          const TensorView& q, uintptr_t stream) {
  Plan plan("quantize_static", x);
  plan.static_scale(scale, bits);
  plan.levels(q, x, bits, false);
  plan.launch(stream);
}

void quantize_dynamic_cuda(const TensorView& x, int64_t bits, double clip, const TensorView& q,
                           const TensorView& scale, uintptr_t stream) {
  Plan plan("quantize_dynamic", x);
  plan.dynamic_scale(scale, bits);
  PQ_CHECK(plan.check.op, clip > 0.0, "clip: expected a number above 0, got ", clip);
  plan.params.clip = static_cast<float>(clip);
  plan.levels(q, x, bits, false);
  plan.launch(stream);
}

void rmsnorm_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                  const TensorView& y, uintptr_t stream) {
  Plan plan("rmsnorm", x);
  plan.normalize(weight, eps);
  check_cuda_result(plan.check, y, "y", x.dtype, x, "x", plan.device);
  plan.params.scaling = RowScale::kNone;
  plan.params.output = RowResult::kFloat;
  plan.params.out = y.ptr;
  plan.launch(stream);
}

void rmsnorm_quantize_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                           const TensorView& scale, int64_t bits, const OptionalTensor& shift,
                           const TensorView& q, uintptr_t stream) {
  Plan plan("rmsnorm_quantize", x);
  plan.normalize(weight, eps, shift);
  plan.static_scale(scale, bits);
  plan.levels(q, x, bits, true);
  plan.launch(stream);
}

void rmsnorm_quantize_dynamic_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                                   int64_t bits, const TensorView& q, const TensorView& scale,
                                   uintptr_t stream) {
  Plan plan("rmsnorm_quantize_dynamic", x);
  plan.normalize(weight, eps);
  plan.dynamic_scale(scale, bits);
  plan.levels(q, x, bits, false);
  plan.launch(stream);
}

void add_rmsnorm_quantize_cuda(const TensorView& residual, const TensorView& x,
                               const OptionalTensor& weight, double eps, const TensorView& scale,
                               int64_t bits, const OptionalTensor& shift, const TensorView& q,
                               uintptr_t stream) {
  Plan plan("add_rmsnorm_quantize", x);
  const CudaRowInput sum(plan.check, residual, "residual", plan.device);
  plan.check.dtype(residual, "residual", x.dtype);
  plan.check.same_shape(residual, "residual", x, "x");
  PQ_CHECK(plan.check.op, sum.rows.rows <= 1 || sum.rows.stride >= sum.rows.cols,
           "residual: expected rows that do not overlap, got a row stride of ", sum.rows.stride);
  plan.params.residual = residual.ptr;
  plan.params.residual_stride = sum.rows.stride;
  plan.normalize(weight, eps, shift);
  plan.static_scale(scale, bits);
  plan.levels(q, x, bits, true);
  plan.launch(stream);
}

}  // namespace prefixquant
