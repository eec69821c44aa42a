// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<SignSums<12, 2>>(int vectors) {
  return pick_rmsnorm_hadamard<SignSums<12, 2>, 1, 2, 4>(vectors);
}
}  // namespace prefixquant
