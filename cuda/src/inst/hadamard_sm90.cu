// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_wgmma.cuh"

namespace prefixquant {

template <int kSteps, int kPow2>
HadamardMmaKernel hadamard_wgmma_instance(bool swiglu) {
  using Shape = HadamardWgmmaShape<kSteps, kPow2>;
  return swiglu ? hadamard_wgmma_kernel<Shape, true> : hadamard_wgmma_kernel<Shape, false>;
}

template HadamardMmaKernel hadamard_wgmma_instance<3, 64>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<4, 64>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<5, 64>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<6, 64>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<3, 128>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<4, 128>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<5, 128>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<6, 128>(bool);
template HadamardMmaKernel hadamard_wgmma_instance<4, 256>(bool);

}  // namespace prefixquant
