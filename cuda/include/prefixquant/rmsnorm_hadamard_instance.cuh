// SPDX-License-Identifier: Apache-2.0
//
// For the files that instantiate the kernels of rmsnorm_hadamard.cuh: one k each, because every sum
// is written out.
#pragma once

#include "prefixquant/rmsnorm_hadamard.cuh"

namespace prefixquant {

template <typename Sums, int kSegment>
constexpr RmsnormHadamardKernel compiled_rmsnorm_hadamard() {
  constexpr int kVectors = rmsnorm_hadamard_vectors(Sums::K, kSegment);
  constexpr RmsnormHadamardBounds kBounds = rmsnorm_hadamard_bounds(Sums::K, kSegment);
  return rmsnorm_hadamard_kernel<Sums, kVectors, kSegment, kBounds.threads, kBounds.ctas>;
}

template <typename Sums, int... kSegments>
RmsnormHadamardKernel pick_rmsnorm_hadamard(int64_t segment) {
  RmsnormHadamardKernel kernel = nullptr;
  const auto offer = [&](int compiled, RmsnormHadamardKernel offered) {
    if (segment == compiled) kernel = offered;
  };
  (offer(kSegments, compiled_rmsnorm_hadamard<Sums, kSegments>()), ...);
  return kernel;
}

}  // namespace prefixquant
