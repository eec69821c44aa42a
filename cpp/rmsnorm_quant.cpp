// SPDX-License-Identifier: Apache-2.0
// rmsnorm, rmsnorm_quantize(_dynamic), add_rmsnorm_quantize: y = (x * rstd) * weight, rstd =
// float32(1 / sqrt(mean(x^2) + eps)); then y rounded to x's dtype, or quantize_static of it (of
// y - shift, where there is a shift), or quantize_dynamic of it. The mean is taken in float64, the
// products and the difference are float32.
//   x [..., C] floating, rows at one distance; weight and shift [C] floating or absent; scale
//   float32 [], or [rows] and written; q int8, x's shape, or uint8 [..., C/2] with the even index
//   in the low nibble. With a residual (x's dtype and shape), residual = round(residual + x) is
//   normalized instead.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using RmsnormKernel = void(const RmsnormRows&, int64_t row_begin, int64_t row_end, float* scratch);
PQ_KERNEL_TABLE(RmsnormKernel, rmsnorm_rows);

namespace {

RmsnormRows plan(const ArgumentChecker& check, const TensorView& x, const RowView& rows,
                 const OptionalTensor& weight, double eps, const OptionalTensor& shift = {}) {
  RmsnormRows params{};
  params.x = x.ptr;
  params.x_type = float_type(check, x, "x");
  params.x_stride = rows.stride;
  params.cols = rows.cols;
  params.eps = eps;
  params.weight = checked_channels(check, weight, "weight", rows.cols);
  params.shift = checked_channels(check, shift, "shift", rows.cols);
  PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
  return params;
}

// Device and dtype come first, as in every operation.
RowView checked_rows(const ArgumentChecker& check, const TensorView& x, const char* name) {
  check.on_cpu(x, name);
  check.floating(x, name);
  return RowView(check, x, name);
}

void run(const RmsnormRows& params, int64_t rows) {
  const auto kernel = rmsnorm_rows_table.pick();
  for_row_ranges(
      rows, 2 * params.cols, 3 * (params.cols + 16) + params.cols / 4 + 16,
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

}  // namespace

void rmsnorm(const TensorView& x, const OptionalTensor& weight, double eps, const TensorView& y) {
  const ArgumentChecker check{"rmsnorm"};
  const RowView rows = checked_rows(check, x, "x");
  RmsnormRows params = plan(check, x, rows, weight, eps);
  check.on_cpu(y, "y");
  check.dtype(y, "y", x.dtype);
  check.contiguous(y, "y");
  check.same_shape(y, "y", x, "x");
  params.y = y.ptr;
  params.output = RowOutput::kFloat;
  run(params, rows.rows);
}

void rmsnorm_quantize(const TensorView& x, const OptionalTensor& weight, double eps,
                      const TensorView& scale, int64_t bits, const OptionalTensor& shift,
                      const TensorView& q) {
  const ArgumentChecker check{"rmsnorm_quantize"};
  const RowView rows = checked_rows(check, x, "x");
  RmsnormRows params = plan(check, x, rows, weight, eps, shift);
  params.quantizer = quantizer_params(check, scale, bits);
  params.output = check_quantized_or_packed(check, q, x, "x", bits);
  params.y = q.ptr;
  run(params, rows.rows);
}

void rmsnorm_quantize_dynamic(const TensorView& x, const OptionalTensor& weight, double eps,
                              int64_t bits, const TensorView& q, const TensorView& scale) {
  const ArgumentChecker check{"rmsnorm_quantize_dynamic"};
  const RowView rows = checked_rows(check, x, "x");
  RmsnormRows params = plan(check, x, rows, weight, eps);
  params.quantizer = quantizer_bounds(check, bits);
  check_quantized(check, q, x, "x");
  params.output = RowOutput::kInt8;
  params.y = q.ptr;
  params.row_scale = checked_row_scales(check, scale, rows.rows);
  run(params, rows.rows);
}

void add_rmsnorm_quantize(const TensorView& residual, const TensorView& x,
                          const OptionalTensor& weight, double eps, const TensorView& scale,
                          int64_t bits, const OptionalTensor& shift, const TensorView& q) {
  const ArgumentChecker check{"add_rmsnorm_quantize"};
  const RowView rows = checked_rows(check, x, "x");
  const RowView residual_rows = checked_rows(check, residual, "residual");
  check.dtype(residual, "residual", x.dtype);
  check.same_shape(residual, "residual", x, "x");
  PQ_CHECK(check.op, residual_rows.rows <= 1 || residual_rows.stride >= residual_rows.cols,
           "residual: expected rows that do not overlap, got a row stride of ",
           residual_rows.stride);
  RmsnormRows params = plan(check, x, rows, weight, eps, shift);
  params.residual = residual.ptr;
  params.residual_stride = residual_rows.stride;
  params.quantizer = quantizer_params(check, scale, bits);
  params.output = check_quantized_or_packed(check, q, x, "x", bits);
  params.y = q.ptr;
  run(params, rows.rows);
}

}  // namespace prefixquant
