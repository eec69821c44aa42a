// SPDX-License-Identifier: Apache-2.0
// q = clamp(rint(x * inv_scale), qmin, qmax), row by row.
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

void quantize_rows(const QuantizeRows& p, int64_t row_begin, int64_t row_end) {
  with_float_type(p.x_type, p.x, [&](auto* x) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      quantize_row(x + row * p.x_stride, p.q + row * p.cols, p.cols, p.quantizer);
    }
  });
}

PQ_ISA_NAMESPACE_END
