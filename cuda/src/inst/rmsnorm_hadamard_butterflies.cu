// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<1>>(int64_t segment) {
  return pick_rmsnorm_hadamard<Butterflies<1>, 0, 512, 1024>(segment);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<2>>(int64_t segment) {
  return pick_rmsnorm_hadamard<Butterflies<2>, 256, 1024>(segment);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<4>>(int64_t segment) {
  return pick_rmsnorm_hadamard<Butterflies<4>, 256, 1024>(segment);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<8>>(int64_t segment) {
  return pick_rmsnorm_hadamard<Butterflies<8>, 256, 1024>(segment);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<16>>(int64_t segment) {
  return pick_rmsnorm_hadamard<Butterflies<16>, 256, 1024>(segment);
}
}  // namespace prefixquant
