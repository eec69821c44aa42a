// SPDX-License-Identifier: Apache-2.0
// quantize_dynamic: scale[r] = clip * max_c |x[r, c]| / qmax, 1 where that is 0, and q =
// clamp(rint(x * (1 / scale)), -qmax - 1, qmax), qmax = 2^(bits-1) - 1, float32, ties to even.
//   x [..., C] float32/bfloat16/float16, rows at one distance; q int8, x's shape; scale float32
//   [rows]. A NaN makes its row's scale NaN and its levels 0; an infinity a scale of infinity and
//   levels of 0.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using QuantizeDynamicKernel = void(const QuantizeDynamicRows&, int64_t row_begin, int64_t row_end);
PQ_KERNEL_TABLE(QuantizeDynamicKernel, quantize_dynamic_rows);

void quantize_dynamic(const TensorView& x, int64_t bits, double clip, const TensorView& q,
                      const TensorView& scale) {
  const ArgumentChecker check{"quantize_dynamic"};
  check.on_cpu(x, "x");
  const FloatType x_type = float_type(check, x, "x");
  const RowView rows(check, x, "x");
  const QuantizerParams quantizer = quantizer_bounds(check, bits);
  PQ_CHECK(check.op, clip > 0.0, "clip: expected a number above 0, got ", clip);
  check_quantized(check, q, x, "x");
  float* const row_scale = checked_row_scales(check, scale, rows.rows);

  const QuantizeDynamicRows params{x.ptr,     x_type,    rows.stride, q.data<int8_t>(),
                                   row_scale, rows.cols, quantizer,   static_cast<float>(clip)};
  const auto kernel = quantize_dynamic_rows_table.pick();
  for_row_ranges(rows.rows, 2 * rows.cols, 0,
                 [&](int64_t begin, int64_t end, float*) { kernel(params, begin, end); });
}

}  // namespace prefixquant
