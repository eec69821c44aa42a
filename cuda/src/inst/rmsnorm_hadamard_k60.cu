// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<SignSums<60, 1>>(int vectors) {
  return pick_rmsnorm_hadamard<SignSums<60, 1>, 1>(vectors);
}
}  // namespace prefixquant
