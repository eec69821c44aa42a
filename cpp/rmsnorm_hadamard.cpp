// SPDX-License-Identifier: Apache-2.0
// rmsnorm_hadamard_quantize: q = quantize_static(H (x * weight) * rstd - shift), rstd = float32(1 /
// sqrt(mean(x^2) + eps)), H the transform of hadamard over the whole row; the mean in float64, the
// rest float32, each product and the difference rounded.
//   x [..., C] floating, rows at one distance, C = 2^m k; weight and shift [C] floating or absent;
//   signs int8 [k, k] of +-1, absent for k = 1; scale float32 []; q int8, x's shape.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using RmsnormHadamardKernel = void(const RmsnormHadamardRows&, int64_t row_begin, int64_t row_end,
                                   float* scratch);
PQ_KERNEL_TABLE(RmsnormHadamardKernel, rmsnorm_hadamard_rows);

void rmsnorm_hadamard_quantize(const TensorView& x, const OptionalTensor& weight, double eps,
                               const OptionalTensor& signs, const TensorView& scale, int64_t bits,
                               const OptionalTensor& shift, const TensorView& q) {
  const ArgumentChecker check{"rmsnorm_hadamard_quantize"};
  check.on_cpu(x, "x");
  RmsnormHadamardRows params{};
  params.x_type = float_type(check, x, "x");
  const RowView rows(check, x, "x");
  params.x = x.ptr;
  params.x_stride = rows.stride;
  params.cols = rows.cols;
  params.weight = checked_channels(check, weight, "weight", rows.cols);
  PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
  params.eps = eps;
  params.hadamard = hadamard_params(check, signs, rows.cols, "x: expected a last dimension of");
  params.quantizer = quantizer_params(check, scale, bits);
  params.shift = checked_channels(check, shift, "shift", rows.cols);
  check_quantized(check, q, x, "x");
  params.q = q.data<int8_t>();
  const auto kernel = rmsnorm_hadamard_rows_table.pick();
  // The norm and the transform, as rmsnorm and hadamard weigh them.
  for_row_ranges(
      rows.rows, params.cols * (10 + params.hadamard.k / 4), 4 * (params.cols + 16),
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

}  // namespace prefixquant
