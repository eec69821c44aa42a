// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/gemm_w4_sm90_launch.cuh"

namespace prefixquant {
PQ_INSTANTIATE_GEMM_W4_SM90(4, 2, 64, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 64, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 64, 2, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 64, 1, 2)
}  // namespace prefixquant
