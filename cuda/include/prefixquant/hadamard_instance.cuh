// SPDX-License-Identifier: Apache-2.0
//
// For the files that instantiate the kernels of hadamard.cuh and hadamard_pair.cuh: one k each,
// because every sum is written out.
#pragma once

#include "prefixquant/hadamard_pair.cuh"

namespace prefixquant {

template <typename Sums, int kCtasPerSm>
HadamardSumsKernel hadamard_sums_instance() {
  return hadamard_sums_kernel<Sums, kCtasPerSm>;
}

template <typename Sums, int kCtasPerSm>
HadamardSumsKernel hadamard_pair_instance() {
  return hadamard_pair_kernel<Sums, kCtasPerSm>;
}

}  // namespace prefixquant
