// SPDX-License-Identifier: Apache-2.0
// scale = clip * max|x| / qmax of each row (1 where that is 0), q = clamp(rint(x * (1 / scale)),
// ...).
#include "quantize_dynamic.h"

PQ_ISA_NAMESPACE_BEGIN

void quantize_dynamic_rows(const QuantizeDynamicRows& p, int64_t row_begin, int64_t row_end) {
  with_float_type(p.x_type, p.x, [&](auto* x) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      p.row_scale[row] = quantize_row_dynamic(x + row * p.x_stride, p.q + row * p.cols, p.cols,
                                              p.quantizer, p.clip);
    }
  });
}

PQ_ISA_NAMESPACE_END
