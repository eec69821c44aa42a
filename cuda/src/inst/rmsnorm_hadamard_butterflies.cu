// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard_instance.cuh"

namespace prefixquant {
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<1>>(int vectors) {
  return pick_rmsnorm_hadamard<Butterflies<1>, 1>(vectors);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<2>>(int vectors) {
  return pick_rmsnorm_hadamard<Butterflies<2>, 1>(vectors);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<4>>(int vectors) {
  return pick_rmsnorm_hadamard<Butterflies<4>, 1>(vectors);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<8>>(int vectors) {
  return pick_rmsnorm_hadamard<Butterflies<8>, 1>(vectors);
}
template <>
RmsnormHadamardKernel rmsnorm_hadamard_instance<Butterflies<16>>(int vectors) {
  return pick_rmsnorm_hadamard<Butterflies<16>, 1, 2, 4>(vectors);
}
}  // namespace prefixquant
