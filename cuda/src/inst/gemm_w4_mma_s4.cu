// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/gemm_w4_mma_launch.cuh"

namespace prefixquant {
PQ_GEMM_W4_MMA_S4(PQ_INSTANTIATE_GEMM_W4_MMA)
}  // namespace prefixquant
