// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_pair_wgmma.cuh"

namespace prefixquant {

template <int kIndex>
HadamardMmaKernel hadamard_pair_wgmma_instance(bool swiglu) {
  using Shape = HadamardPairWgmmaShape<kIndex>;
  return swiglu ? hadamard_pair_wgmma_kernel<Shape, true>
                : hadamard_pair_wgmma_kernel<Shape, false>;
}

static_assert(kHadamardPairBlockCount == 3);
template HadamardMmaKernel hadamard_pair_wgmma_instance<0>(bool);
template HadamardMmaKernel hadamard_pair_wgmma_instance<1>(bool);
template HadamardMmaKernel hadamard_pair_wgmma_instance<2>(bool);

}  // namespace prefixquant
