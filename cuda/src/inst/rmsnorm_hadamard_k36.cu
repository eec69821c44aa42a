// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<SignSums<36, 1>>(int64_t segment) {
  return pick_rmsnorm_hadamard<SignSums<36, 1>, 0, 128, 256>(segment);
}
}  // namespace prefixquant
