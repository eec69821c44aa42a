// SPDX-License-Identifier: Apache-2.0
// row_max[t] = max_c |x[t, c]|.
#include "abs_max.h"

PQ_ISA_NAMESPACE_BEGIN

void abs_max_rows(const AbsMaxRows& p, int64_t row_begin, int64_t row_end) {
  with_float_type(p.x_type, p.x, [&](auto* x) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      p.row_max[row] = abs_max_row(x + row * p.x_stride, p.cols);
    }
  });
}

PQ_ISA_NAMESPACE_END
