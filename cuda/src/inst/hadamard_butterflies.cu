// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_instance.cuh"

namespace prefixquant {
template HadamardSumsKernel hadamard_sums_instance<Butterflies<1>, 2, 2>(bool, int);
template HadamardSumsKernel hadamard_sums_instance<Butterflies<2>, 2, 2>(bool, int);
template HadamardSumsKernel hadamard_sums_instance<Butterflies<4>, 2, 2>(bool, int);
template HadamardSumsKernel hadamard_sums_instance<Butterflies<8>, 2, 2>(bool, int);
template HadamardSumsKernel hadamard_sums_instance<Butterflies<16>, 2, 2>(bool, int);
template HadamardSumsKernel hadamard_sums_instance<Butterflies<32>, 2, 2>(bool, int);
}  // namespace prefixquant
