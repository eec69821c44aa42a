// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template RmsnormHadamardKernel rmsnorm_hadamard_instance<SignSums<36, 1>>(int64_t);
}  // namespace prefixquant
