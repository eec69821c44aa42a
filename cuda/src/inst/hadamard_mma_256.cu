// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_mma_instance.cuh"

namespace prefixquant {
template HadamardMmaKernel hadamard_mma_instance<5, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<6, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<7, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<8, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<9, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<10, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<11, 2, 2>(bool);
template HadamardMmaKernel hadamard_mma_instance<12, 2, 2>(bool);
}  // namespace prefixquant
