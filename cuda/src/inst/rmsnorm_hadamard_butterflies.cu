// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<1>>(int64_t);
template RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<2>>(int64_t);
template RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<4>>(int64_t);
template RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<8>>(int64_t);
template RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<16>>(int64_t);
}  // namespace prefixquant
