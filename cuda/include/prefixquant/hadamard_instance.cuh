// SPDX-License-Identifier: Apache-2.0
//
// For the files that instantiate the kernels of hadamard.cuh and hadamard_pair.cuh: one k each,
// because every sum is written out.
#pragma once

#include "prefixquant/hadamard_pair.cuh"

namespace prefixquant {

template <typename Sums, int kCtasPerSm, int kShortCtas>
HadamardSumsKernel hadamard_sums_instance(bool swiglu, int columns) {
  // Several parts of 1024 are never short.
  if constexpr (Sums::K > 1 || Sums::kInputs == 1) {
    if (columns < 512) {
      return swiglu ? hadamard_sums_kernel<Sums, kShortCtas, true, true>
                    : hadamard_sums_kernel<Sums, kShortCtas, false, true>;
    }
  }
  return swiglu ? hadamard_sums_kernel<Sums, kCtasPerSm, true, false>
                : hadamard_sums_kernel<Sums, kCtasPerSm, false, false>;
}

template <typename Sums, int kCtasPerSm>
HadamardSumsKernel hadamard_pair_instance() {
  return hadamard_pair_kernel<Sums, kCtasPerSm>;
}

}  // namespace prefixquant
