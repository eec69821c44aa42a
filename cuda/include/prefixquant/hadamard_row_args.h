// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of hadamard.cuh and hadamard_cluster.cuh are told alike; see RowHadamardParams
// for the pointers.
#pragma once

#include "prefixquant/fast_divisor.h"
#include "prefixquant/hadamard.h"

namespace prefixquant {

struct HadamardRowArgs {
  const uint16_t* x;
  const uint16_t* up;
  int64_t x_stride, up_stride;
  void* out;
  RowScale scaling;
  const float* scale;
  float* row_scale;
  float qmin, qmax;
  float norm;  // 1 / sqrt(block_size)
  const int8_t* signs;
  bool is_bfloat16;
  int block_size;
  FastDivisor blocks_per_row;
};

}  // namespace prefixquant
