// SPDX-License-Identifier: Apache-2.0
// hadamard, hadamard_quantize and swiglu_hadamard_quantize(_dynamic) on CUDA: the checks of
// hadamard.cpp, then one launch. The values of the signs lie in device memory and are not looked at
// here: the kernels take any matrix of 1 and -1.
#include "prefixquant/hadamard.h"

#include "ops_cuda.h"
#include "rows_cuda.h"

namespace prefixquant {
namespace {

struct Plan {
  ArgumentChecker check;
  int device;
  RowHadamardParams params;

  Plan(const char* op, const TensorView& x, const char* name, const OptionalTensor& signs,
       int64_t block_size)
      : check{op}, device(cuda_device_of(check, x, name)) {
    const CudaRowInput input(check, x, name, device);
    params.x = x.ptr;
    params.dtype = input.dtype;
    params.x_stride = input.rows.stride;
    params.rows = input.rows.rows;
    params.cols = input.rows.cols;
    PQ_CHECK(op, block_size >= 1, "block_size: expected 1 or more, got ", block_size);
    params.signs =
        checked_cuda_signs(check, signs, block_size, "block_size: expected", device, params.k);
    PQ_CHECK(op, params.cols % block_size == 0, name,
             ": expected a last dimension that block_size ", block_size, " divides, got shape ",
             x.shape_text());
    params.block_size = block_size;
  }

  void up(const TensorView& gate, const TensorView& up) {
    check.on_cuda(up, "up", device);
    check.dtype(up, "up", gate.dtype);
    check.same_shape(up, "up", gate, "gate");
    const CudaRowInput input(check, up, "up", device);
    params.up = up.ptr;
    params.up_stride = input.rows.stride;
  }

  void bounds(int64_t bits) {
    const LevelBounds bounds(check, bits);
    params.qmin = bounds.qmin;
    params.qmax = bounds.qmax;
  }

  void static_levels(const TensorView& x, const char* name, const TensorView& scale, int64_t bits,
                     const TensorView& q) {
    params.scaling = RowScale::kStatic;
    params.scale = checked_cuda_scale(check, scale, device);
    bounds(bits);
    check_cuda_result(check, q, "q", DType::kInt8, x, name, device);
    params.out = q.ptr;
  }

  void launch(uintptr_t stream) const { launch_hadamard(params, as_cuda_stream(stream)); }
};

}  // namespace

void hadamard_cuda(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
                   const TensorView& y, uintptr_t stream) {
  Plan plan("hadamard", x, "x", signs, block_size);
  check_cuda_result(plan.check, y, "y", x.dtype, x, "x", plan.device);
  plan.params.scaling = RowScale::kNone;
  plan.params.out = y.ptr;
  plan.launch(stream);
}

void hadamard_quantize_cuda(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
                            const TensorView& scale, int64_t bits, const TensorView& q,
                            uintptr_t stream) {
  Plan plan("hadamard_quantize", x, "x", signs, block_size);
  plan.static_levels(x, "x", scale, bits, q);
  plan.launch(stream);
}

void swiglu_hadamard_quantize_cuda(const TensorView& gate, const TensorView& up,
                                   const OptionalTensor& signs, int64_t block_size,
                                   const TensorView& scale, int64_t bits, const TensorView& q,
                                   uintptr_t stream) {
  Plan plan("swiglu_hadamard_quantize", gate, "gate", signs, block_size);
  plan.up(gate, up);
  plan.static_levels(gate, "gate", scale, bits, q);
  plan.launch(stream);
}

void swiglu_hadamard_quantize_dynamic_cuda(const TensorView& gate, const TensorView& up,
                                           const OptionalTensor& signs, int64_t block_size,
                                           int64_t bits, const TensorView& q,
                                           const TensorView& scale, uintptr_t stream) {
  Plan plan("swiglu_hadamard_quantize_dynamic", gate, "gate", signs, block_size);
  plan.up(gate, up);
  plan.params.scaling = RowScale::kDynamic;
  plan.bounds(bits);
  plan.params.row_scale = checked_cuda_row_scales(plan.check, scale, plan.params.rows, plan.device);
  check_cuda_result(plan.check, q, "q", DType::kInt8, gate, "gate", plan.device);
  plan.params.out = q.ptr;
  plan.launch(stream);
}

void hadamard_compiled_signs(int64_t k, const TensorView& signs) {
  const ArgumentChecker check{"hadamard_compiled_signs"};
  check.on_cpu(signs, "signs");
  check.dtype(signs, "signs", DType::kInt8);
  check.rank(signs, "signs", 2);
  check.contiguous(signs, "signs");
  check.size(signs, "signs", 0, k);
  check.size(signs, "signs", 1, k);
  PQ_CHECK(check.op, compiled_hadamard_signs(k, signs.data<int8_t>()),
           "k: expected a size with a kernel of its own, got ", k);
}

}  // namespace prefixquant
