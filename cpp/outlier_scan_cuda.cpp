// SPDX-License-Identifier: Apache-2.0
// outlier_scan on CUDA: the checks of outlier_scan.cpp, then two launches.
#include "prefixquant/outlier_scan.h"

#include "argument_checks.h"
#include "ops_cuda.h"
#include "rows_cuda.h"

namespace prefixquant {

void outlier_scan_cuda(const TensorView& x, double eta, const TensorView& row_max,
                       const TensorView& median, const TensorView& is_outlier, uintptr_t stream) {
  const ArgumentChecker check{"outlier_scan"};
  const int device = cuda_device_of(check, x, "x");
  check.floating(x, "x");
  check.rank(x, "x", 2);
  const CudaRowInput input(check, x, "x", device);
  check_outlier_scan(
      check, input.rows.rows, eta, row_max, median, is_outlier,
      [&](const TensorView& t, const char* name) { check.on_cuda(t, name, device); });
  OutlierScanParams params;
  params.x = x.ptr;
  params.dtype = input.dtype;
  params.x_stride = input.rows.stride;
  params.row_max = row_max.data<float>();
  params.median = median.data<float>();
  params.is_outlier = is_outlier.data<bool>();
  params.eta = static_cast<float>(eta);
  params.rows = input.rows.rows;
  params.cols = input.rows.cols;
  launch_outlier_scan(params, as_cuda_stream(stream));
}

}  // namespace prefixquant
