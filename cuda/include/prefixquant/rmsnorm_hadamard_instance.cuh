// SPDX-License-Identifier: Apache-2.0
//
// For the files that instantiate the kernels of rmsnorm_hadamard.cuh: one k each, because every sum
// is written out.
#pragma once

#include "prefixquant/rmsnorm_hadamard.cuh"

namespace prefixquant {

template <typename Sums, int kIndex = 0>
RmsnormHadamardKernel find_rmsnorm_hadamard(int64_t segment) {
  constexpr int kCount = sizeof(kRmsnormHadamardSegments) / sizeof(kRmsnormHadamardSegments[0]);
  if constexpr (kIndex < kCount) {
    constexpr int kSegment = kRmsnormHadamardSegments[kIndex];
    if constexpr (rmsnorm_hadamard_is_compiled(Sums::K, Sums::kInputs, kSegment)) {
      constexpr int kVectors = rmsnorm_hadamard_vectors(Sums::K, kSegment);
      constexpr RmsnormHadamardBounds kBounds = rmsnorm_hadamard_bounds(Sums::K, kSegment);
      if (segment == kSegment) {
        return rmsnorm_hadamard_kernel<Sums, kVectors, kSegment, kBounds.threads, kBounds.ctas>;
      }
    }
    return find_rmsnorm_hadamard<Sums, kIndex + 1>(segment);
  }
  return nullptr;
}

template <typename Sums>
RmsnormHadamardKernel rmsnorm_hadamard_instance(int64_t segment) {
  return find_rmsnorm_hadamard<Sums>(segment);
}

}  // namespace prefixquant
