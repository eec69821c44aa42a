// SPDX-License-Identifier: Apache-2.0
//
// Launch of one tile shape of the Hopper GEMM, and the list of tile shapes that are compiled.
#pragma once

#include "prefixquant/check.h"
#include "prefixquant/gemm_w4_sm90.cuh"

namespace prefixquant {

// Every compiled tile: X(weight_bits, m64_groups, block_tokens, cluster, split_k); channels of a
// CTA tile = 128 * m64_groups. One explicit instantiation each, in src/inst/gemm_w4_sm90_*.cu.
#define PQ_GEMM_W4_SM90_TILES(X) \
  X(4, 1, 256, 2, 1)             \
  X(4, 1, 192, 2, 1)             \
  X(4, 1, 128, 1, 1)             \
  X(4, 1, 128, 2, 1)             \
  X(4, 1, 128, 1, 2)             \
  X(4, 1, 96, 1, 1)              \
  X(4, 1, 96, 1, 2)              \
  X(4, 2, 64, 1, 1)              \
  X(4, 1, 64, 1, 1)              \
  X(4, 1, 64, 2, 1)              \
  X(4, 1, 64, 1, 2)              \
  X(4, 2, 32, 1, 1)              \
  X(4, 1, 32, 1, 1)              \
  X(4, 1, 32, 1, 2)              \
  X(4, 1, 16, 1, 1)              \
  X(8, 1, 256, 2, 1)             \
  X(8, 1, 192, 2, 1)             \
  X(8, 1, 128, 1, 1)             \
  X(8, 1, 128, 2, 1)             \
  X(8, 1, 128, 1, 2)             \
  X(8, 1, 64, 1, 1)              \
  X(8, 1, 64, 1, 2)              \
  X(8, 1, 32, 1, 1)              \
  X(8, 1, 32, 1, 2)              \
  X(8, 1, 16, 1, 1)

template <typename Traits>
void launch_gemm_w4_sm90_tile(const CUtensorMap& x_map, const GemmW4Sm90Args& args, int grid,
                              cudaStream_t stream) {
  const auto kernel = gemm_w4_sm90_kernel<Traits>;
  PQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     Traits::kSmemBytes));
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(grid);
  launch.blockDim = dim3(Traits::kThreads);
  launch.dynamicSmemBytes = Traits::kSmemBytes;
  launch.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = Traits::kCluster * Traits::kSplitK;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  // Weights are prefetched while the kernel before drains; see the producers.
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = attributes;
  launch.numAttrs = 2;
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, x_map, args));
}

#define PQ_INSTANTIATE_GEMM_W4_SM90(bits, m64, tokens, cluster, split)                         \
  template void launch_gemm_w4_sm90_tile<GemmW4Sm90Traits<bits, m64, tokens, cluster, split>>( \
      const CUtensorMap&, const GemmW4Sm90Args&, int, cudaStream_t);

#define PQ_EXTERN_GEMM_W4_SM90(bits, m64, tokens, cluster, split) \
  extern PQ_INSTANTIATE_GEMM_W4_SM90(bits, m64, tokens, cluster, split)

}  // namespace prefixquant
