// SPDX-License-Identifier: Apache-2.0
// outlier_scan: row_max[t] = max_c |x[t, c]|, median = the lower median of row_max, and
// is_outlier[t] = row_max[t] / median > eta, float32. x is read once.
//   x [T, C] floating, contiguous rows at one distance; row_max float32 [T]; median float32 [];
//   is_outlier bool [T]. As in torch, a NaN in x makes its row_max and the median NaN, and nothing
//   compares greater then; the median of no rows is NaN.
#include <algorithm>
#include <cmath>
#include <limits>

#include "argument_checks.h"
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using AbsMaxKernel = void(const AbsMaxRows&, int64_t row_begin, int64_t row_end);
PQ_KERNEL_TABLE(AbsMaxKernel, abs_max_rows);

namespace {

float lower_median(const float* values, int64_t count) {
  if (count == 0) return std::numeric_limits<float>::quiet_NaN();
  const auto bytes = count * static_cast<int64_t>(sizeof(float));
  float* sorted = static_cast<float*>(thread_scratch(ScratchSlot::kRowData, bytes));
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(values[i])) return values[i];  // nth_element needs an order
    sorted[i] = values[i];
  }
  const int64_t middle = (count - 1) / 2;
  std::nth_element(sorted, sorted + middle, sorted + count);
  return sorted[middle];
}

}  // namespace

void outlier_scan(const TensorView& x, double eta, const TensorView& row_max,
                  const TensorView& median, const TensorView& is_outlier) {
  const ArgumentChecker check{"outlier_scan"};
  check.on_cpu(x, "x");
  const FloatType x_type = float_type(check, x, "x");
  check.rank(x, "x", 2);
  const RowView rows(check, x, "x");
  check_outlier_scan(check, rows.rows, eta, row_max, median, is_outlier,
                     [&](const TensorView& t, const char* name) { check.on_cpu(t, name); });

  const AbsMaxRows params{x.ptr, x_type, rows.stride, row_max.data<float>(), rows.cols};
  const auto kernel = abs_max_rows_table.pick();
  for_row_ranges(rows.rows, rows.cols, 0,
                 [&](int64_t begin, int64_t end, float*) { kernel(params, begin, end); });
  const float middle = lower_median(params.row_max, rows.rows);
  *median.data<float>() = middle;
  bool* flags = is_outlier.data<bool>();
  for (int64_t t = 0; t < rows.rows; ++t) {
    flags[t] = params.row_max[t] / middle > static_cast<float>(eta);
  }
}

}  // namespace prefixquant
