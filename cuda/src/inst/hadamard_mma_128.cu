// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_mma_instance.cuh"

namespace prefixquant {
template HadamardMmaKernel hadamard_mma_instance<5, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<6, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<7, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<8, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<9, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<10, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<11, 1, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<12, 1, 2>(bool);
}  // namespace prefixquant
