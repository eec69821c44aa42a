// SPDX-License-Identifier: Apache-2.0
//
// For the files that instantiate the kernels of hadamard_mma.cuh, one for each number of columns.
#pragma once

#include "prefixquant/hadamard_mma.cuh"

namespace prefixquant {

template <int kTiles, int kParts, int kTasks>
HadamardMmaKernel hadamard_mma_instance(bool swiglu) {
  using Shape = HadamardMmaShape<kTiles, kParts, kTasks>;
  return swiglu ? hadamard_mma_kernel<Shape, true> : hadamard_mma_kernel<Shape, false>;
}

}  // namespace prefixquant
