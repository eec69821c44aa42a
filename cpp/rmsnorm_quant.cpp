// SPDX-License-Identifier: Apache-2.0
// rmsnorm_quantize: y = (x * rstd) * weight, rstd = float32(1 / sqrt(mean(x^2) + eps)), then
// quantize_static. The mean is taken in float64, the products are float32.
//   x [..., C] floating, rows at one distance; weight [C] floating or absent; scale float32 [];
//   q int8, x's shape.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using RmsnormQuantizeKernel = void(const RmsnormQuantizeRows&, int64_t row_begin, int64_t row_end,
                                   float* scratch);
PQ_KERNEL_TABLE(RmsnormQuantizeKernel, rmsnorm_quantize_rows);

void rmsnorm_quantize(const TensorView& x, const OptionalTensor& weight, double eps,
                      const TensorView& scale, int64_t bits, const TensorView& q) {
  const ArgumentChecker check{"rmsnorm_quantize"};
  check.on_cpu(x, "x");
  const FloatType x_type = float_type(check, x, "x");
  const RowView rows(check, x, "x");
  RmsnormQuantizeRows params{x.ptr, x_type,  rows.stride, nullptr, FloatType::kFloat32,
                             eps,   nullptr, rows.cols,   {}};
  if (weight) {
    check.on_cpu(*weight, "weight");
    params.weight_type = float_type(check, *weight, "weight");
    check.rank(*weight, "weight", 1);
    check.size(*weight, "weight", 0, rows.cols);
    check.contiguous(*weight, "weight");
    params.weight = weight->ptr;
  }
  PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
  params.quantizer = quantizer_params(check, scale, bits);
  check_quantized(check, q, x, "x");
  params.q = q.data<int8_t>();

  const auto kernel = rmsnorm_quantize_rows_table.pick();
  for_row_ranges(
      rows.rows, 2 * rows.cols, rows.cols + 16,
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

}  // namespace prefixquant
