// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of hadamard.cuh and hadamard_cluster.cuh are told alike; see RowHadamardParams
// for the pointers.
#pragma once

#include <cmath>

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

inline int log2_of(int64_t power_of_two) {
  int result = 0;
  while (int64_t{1} << result < power_of_two) ++result;
  return result;
}

inline float hadamard_norm(const RowHadamardParams& p) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.block_size)));
}

// What the arguments of all kernels begin with; the rest is zero.
template <typename Args>
Args begin_hadamard_args(const RowHadamardParams& p) {
  Args a{};
  a.x = static_cast<const uint16_t*>(p.x);
  a.up = static_cast<const uint16_t*>(p.up);
  a.x_stride = p.x_stride;
  a.up_stride = p.up_stride;
  a.out = p.out;
  a.scaling = p.scaling;
  a.scale = p.scale;
  a.row_scale = p.row_scale;
  a.qmin = p.qmin;
  a.qmax = p.qmax;
  a.norm = hadamard_norm(p);
  a.signs = p.signs;
  a.is_bfloat16 = p.dtype == RowDtype::kBFloat16;
  a.block_size = static_cast<int>(p.block_size);
  a.blocks_per_row = FastDivisor(static_cast<uint32_t>(p.cols / p.block_size));
  return a;
}

}  // namespace prefixquant
