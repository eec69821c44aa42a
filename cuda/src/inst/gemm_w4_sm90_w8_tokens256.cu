// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/gemm_w4_sm90_launch.cuh"

namespace prefixquant {
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 256, 2, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 192, 2, 1)
}  // namespace prefixquant
