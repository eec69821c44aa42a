// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_cluster.cuh"

namespace prefixquant {

template <int Q>
HadamardClusterKernel hadamard_cluster_instance() {
  return hadamard_cluster_kernel<Q>;
}

template HadamardClusterKernel hadamard_cluster_instance<0>();
template HadamardClusterKernel hadamard_cluster_instance<1>();
template HadamardClusterKernel hadamard_cluster_instance<2>();
template HadamardClusterKernel hadamard_cluster_instance<4>();

}  // namespace prefixquant
