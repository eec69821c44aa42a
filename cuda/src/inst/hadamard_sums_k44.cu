// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard_instance.cuh"

namespace prefixquant {
template HadamardSumsKernel hadamard_sums_instance<SignSums<44, 1>, 3, 3>(bool, int);
template HadamardSumsKernel hadamard_pair_instance<SignSums<44, 1>, 3>();
}  // namespace prefixquant
