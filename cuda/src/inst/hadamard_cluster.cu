// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_cluster.cuh"

namespace prefixquant {

template <int Q, int kThreads>
HadamardClusterKernel hadamard_cluster_instance() {
  return hadamard_cluster_kernel<Q, kThreads>;
}

template HadamardClusterKernel hadamard_cluster_instance<0, 512>();
template HadamardClusterKernel hadamard_cluster_instance<1, 512>();
template HadamardClusterKernel hadamard_cluster_instance<2, 512>();
template HadamardClusterKernel hadamard_cluster_instance<4, 512>();
template HadamardClusterKernel hadamard_cluster_instance<0, 1024>();
template HadamardClusterKernel hadamard_cluster_instance<1, 1024>();
template HadamardClusterKernel hadamard_cluster_instance<2, 1024>();
template HadamardClusterKernel hadamard_cluster_instance<4, 1024>();

}  // namespace prefixquant
