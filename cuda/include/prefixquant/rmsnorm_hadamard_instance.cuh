// SPDX-License-Identifier: Apache-2.0
//
// For the files that instantiate the kernels of rmsnorm_hadamard.cuh: a few k each, because every
// sum is written out.
#pragma once

#include "prefixquant/rmsnorm_hadamard.cuh"

namespace prefixquant {

template <typename Sums, int kVectors>
constexpr RmsnormHadamardKernel compiled_rmsnorm_hadamard() {
  constexpr RmsnormHadamardBounds kBounds = rmsnorm_hadamard_bounds(Sums::K, kVectors);
  return rmsnorm_hadamard_kernel<Sums, kVectors, kBounds.threads, kBounds.ctas>;
}

template <typename Sums, int... kVectors>
RmsnormHadamardKernel pick_rmsnorm_hadamard(int vectors) {
  RmsnormHadamardKernel kernel = nullptr;
  const auto offer = [&](int compiled, RmsnormHadamardKernel offered) {
    if (vectors == compiled) kernel = offered;
  };
  (offer(kVectors, compiled_rmsnorm_hadamard<Sums, kVectors>()), ...);
  return kernel;
}

}  // namespace prefixquant
