// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/gemm_w4_mma_launch.cuh"

namespace prefixquant {
PQ_GEMM_W4_MMA_W4(PQ_INSTANTIATE_GEMM_W4_MMA)
}  // namespace prefixquant
