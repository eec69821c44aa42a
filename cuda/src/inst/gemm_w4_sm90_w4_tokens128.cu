// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/gemm_w4_sm90_launch.cuh"

namespace prefixquant {
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 128, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 128, 2, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 128, 1, 2)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 96, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(4, 1, 96, 1, 2)
}  // namespace prefixquant
