// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_cluster_mma.cuh"

namespace prefixquant {

template <int kSteps>
HadamardClusterKernel hadamard_cluster_mma_instance() {
  return hadamard_cluster_mma_kernel<kSteps>;
}

template HadamardClusterKernel hadamard_cluster_mma_instance<3>();
template HadamardClusterKernel hadamard_cluster_mma_instance<4>();
template HadamardClusterKernel hadamard_cluster_mma_instance<5>();
template HadamardClusterKernel hadamard_cluster_mma_instance<6>();

}  // namespace prefixquant
