// SPDX-License-Identifier: Apache-2.0
// hadamard, hadamard_quantize, swiglu_hadamard_quantize(_dynamic): y = (H_k (x) H_{2^m}) / sqrt(2^m
// k) on each block of block_size = 2^m k of the last dimension; kernels/hadamard.h fixes the order
// of additions.
//   x, gate, up [..., C] floating, rows at one distance, block_size divides C; signs int8 [k, k] of
//   +-1, absent for k = 1; y x's dtype, or q int8 after quantize_static of the float32 result.
//   The swiglu forms transform silu(gate) * up, float32; the dynamic one quantizes each row with
//   max|y| / qmax, its scale. block_size 1 transforms nothing.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using HadamardKernel = void(const HadamardRows&, int64_t row_begin, int64_t row_end,
                            float* scratch);
PQ_KERNEL_TABLE(HadamardKernel, hadamard_rows);

namespace {

HadamardRows plan_rows(const ArgumentChecker& check, const TensorView& x, const char* name,
                       const RowView& rows, const OptionalTensor& signs, int64_t block_size) {
  HadamardRows params{};
  params.x = x.ptr;
  params.x_type = float_type(check, x, name);
  params.x_stride = rows.stride;
  params.cols = rows.cols;
  params.hadamard = hadamard_params(check, signs, block_size);
  PQ_CHECK(check.op, rows.cols % block_size == 0, name,
           ": expected a last dimension that block_size ", block_size, " divides, got shape ",
           x.shape_text());
  return params;
}

void run(const HadamardRows& params, int64_t rows) {
  const auto kernel = hadamard_rows_table.pick();
  const int64_t block = params.hadamard.block;
  const int64_t chunk = block > 1 ? block : kRowChunk;
  // The k part costs k/4 additions an element and a few; the butterflies and the rest about 8.
  for_row_ranges(
      rows, params.cols * (8 + params.hadamard.k / 4),
      2 * (chunk + 16) + (params.row_scale ? params.cols + 16 : 0),
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

}  // namespace

void hadamard(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
              const TensorView& y) {
  const ArgumentChecker check{"hadamard"};
  check.on_cpu(x, "x");
  float_type(check, x, "x");
  const RowView rows(check, x, "x");
  HadamardRows params = plan_rows(check, x, "x", rows, signs, block_size);
  check.on_cpu(y, "y");
  check.dtype(y, "y", x.dtype);
  check.contiguous(y, "y");
  check.same_shape(y, "y", x, "x");
  params.y = y.ptr;
  run(params, rows.rows);
}

void hadamard_quantize(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
                       const TensorView& scale, int64_t bits, const TensorView& q) {
  const ArgumentChecker check{"hadamard_quantize"};
  check.on_cpu(x, "x");
  float_type(check, x, "x");
  const RowView rows(check, x, "x");
  HadamardRows params = plan_rows(check, x, "x", rows, signs, block_size);
  params.quantizer = quantizer_params(check, scale, bits);
  params.quantized = true;
  check_quantized(check, q, x, "x");
  params.y = q.ptr;
  run(params, rows.rows);
}

namespace {

HadamardRows plan_swiglu(const ArgumentChecker& check, const TensorView& gate, const TensorView& up,
                         const OptionalTensor& signs, int64_t block_size, const TensorView& q,
                         int64_t* rows) {
  check.on_cpu(gate, "gate");
  check.on_cpu(up, "up");
  float_type(check, gate, "gate");
  const RowView gate_rows(check, gate, "gate");
  check.dtype(up, "up", gate.dtype);
  check.same_shape(up, "up", gate, "gate");
  const RowView up_rows(check, up, "up");
  HadamardRows params = plan_rows(check, gate, "gate", gate_rows, signs, block_size);
  params.up = up.ptr;
  params.up_stride = up_rows.stride;
  params.quantized = true;
  check_quantized(check, q, gate, "gate");
  params.y = q.ptr;
  *rows = gate_rows.rows;
  return params;
}

}  // namespace

void swiglu_hadamard_quantize(const TensorView& gate, const TensorView& up,
                              const OptionalTensor& signs, int64_t block_size,
                              const TensorView& scale, int64_t bits, const TensorView& q) {
  const ArgumentChecker check{"swiglu_hadamard_quantize"};
  int64_t rows = 0;
  HadamardRows params = plan_swiglu(check, gate, up, signs, block_size, q, &rows);
  params.quantizer = quantizer_params(check, scale, bits);
  run(params, rows);
}

void swiglu_hadamard_quantize_dynamic(const TensorView& gate, const TensorView& up,
                                      const OptionalTensor& signs, int64_t block_size, int64_t bits,
                                      const TensorView& q, const TensorView& scale) {
  const ArgumentChecker check{"swiglu_hadamard_quantize_dynamic"};
  int64_t rows = 0;
  HadamardRows params = plan_swiglu(check, gate, up, signs, block_size, q, &rows);
  params.quantizer = quantizer_bounds(check, bits);
  params.row_scale = checked_row_scales(check, scale, rows);
  run(params, rows);
}

}  // namespace prefixquant
