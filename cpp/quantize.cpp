// SPDX-License-Identifier: Apache-2.0
// quantize_static: q = clamp(rint(x * (1 / scale)), -2^(bits-1), 2^(bits-1) - 1), float32, ties to
// even.
//   x [..., C] float32/bfloat16/float16, rows at one distance; scale float32 []; q int8, x's shape.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using QuantizeKernel = void(const QuantizeRows&, int64_t row_begin, int64_t row_end);
PQ_KERNEL_TABLE(QuantizeKernel, quantize_rows);

void quantize_static(const TensorView& x, const TensorView& scale, int64_t bits,
                     const TensorView& q) {
  const ArgumentChecker check{"quantize_static"};
  check.on_cpu(x, "x");
  const FloatType x_type = float_type(check, x, "x");
  const RowView rows(check, x, "x");
  const QuantizerParams quantizer = quantizer_params(check, scale, bits);
  check_quantized(check, q, x, "x");

  const QuantizeRows params{x.ptr, x_type, rows.stride, q.data<int8_t>(), rows.cols, quantizer};
  const auto kernel = quantize_rows_table.pick();
  for_row_ranges(rows.rows, rows.cols, 0,
                 [&](int64_t begin, int64_t end, float*) { kernel(params, begin, end); });
}

}  // namespace prefixquant
