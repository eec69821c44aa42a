// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/gemm_w4_sm90_launch.cuh"

namespace prefixquant {
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 128, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 128, 2, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 128, 1, 2)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 64, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 64, 1, 2)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 32, 1, 1)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 32, 1, 2)
PQ_INSTANTIATE_GEMM_W4_SM90(8, 1, 16, 1, 1)
}  // namespace prefixquant
