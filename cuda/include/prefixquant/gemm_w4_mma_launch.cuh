// SPDX-License-Identifier: Apache-2.0
// The compiled geometries of gemm_w4_mma.cuh and the launch of one of them.
#pragma once

#include <algorithm>

#include "prefixquant/check.h"
#include "prefixquant/gemm_w4_mma.cuh"

// X(weight bits, token tiles, row tiles, row warps, k-warps, stages, int4 MMA). A config names one
// by (block_rows, block_tokens, stages), so no two may share these. Which one for which shape, and
// why: gemm_w4_mma_config.cpp. int8 weights take two loads a unit, hence half the stages.
#define PQ_GEMM_W4_MMA_W4(X) \
  X(4, 1, 1, 1, 4, 8, false) \
  X(4, 1, 1, 4, 2, 8, false) \
  X(4, 1, 1, 4, 4, 4, false) \
  X(4, 2, 1, 4, 4, 4, false) \
  X(4, 2, 2, 4, 2, 4, false) \
  X(4, 4, 1, 4, 4, 4, false) \
  X(4, 4, 2, 4, 2, 4, false) \
  X(4, 8, 1, 4, 4, 4, false) \
  X(4, 8, 2, 4, 2, 4, false) \
  X(4, 8, 2, 8, 1, 4, false) \
  X(4, 16, 1, 8, 1, 4, false)
#define PQ_GEMM_W4_MMA_W8(X) \
  X(8, 1, 1, 1, 4, 4, false) \
  X(8, 1, 1, 4, 2, 4, false) \
  X(8, 1, 1, 4, 4, 2, false) \
  X(8, 2, 1, 4, 4, 2, false) \
  X(8, 2, 2, 4, 2, 2, false) \
  X(8, 4, 1, 4, 4, 2, false) \
  X(8, 4, 2, 4, 2, 2, false) \
  X(8, 8, 1, 4, 4, 2, false) \
  X(8, 8, 2, 4, 2, 2, false) \
  X(8, 8, 2, 8, 1, 2, false) \
  X(8, 16, 1, 8, 1, 2, false)
#define PQ_GEMM_W4_MMA_S4(X) \
  X(4, 1, 1, 4, 2, 8, true)  \
  X(4, 2, 2, 4, 2, 4, true)  \
  X(4, 4, 2, 4, 2, 4, true)  \
  X(4, 8, 2, 4, 2, 4, true)  \
  X(4, 16, 1, 8, 1, 4, true)

namespace prefixquant {

// Activation buffers larger than this cost more in CTAs per SM than they save in barriers: 48 KB
// beat 100 KB by up to 12 % (M = 16 and 32, H100).
inline constexpr int kActivationBufferBytes = 48 * 1024;

// The activation buffers of a CTA: the whole k split where it fits, else two chunks in turn.
struct ActivationBuffers {
  int chunk_units;
  int buffers;
};
template <class G>
ActivationBuffers plan_activation_buffers(int tokens, int split_units) {
  const int step = G::kKWarps * G::kStages;
  const auto fitting = [&](int bytes) {
    return std::max(0, bytes / tokens - activation_row_bytes(0)) / kUnitK / step * step;
  };
  const int all = (split_units + step - 1) / step * step;
  if (fitting(kActivationBufferBytes) >= all) return {all, 1};
  const int half = std::max(step, fitting(kActivationBufferBytes / 2));
  return half >= all ? ActivationBuffers{all, 1} : ActivationBuffers{half, 2};
}

template <class G>
void launch_gemm_w4_mma_geometry(const GemmW4Params& p, int splits, cudaStream_t stream) {
  const int tokens = std::min(p.m, G::kTokens);
  const int token_tiles = (p.m + G::kTokens - 1) / G::kTokens;
  const int row_tiles = (p.n + G::kRows - 1) / G::kRows;
  const auto [chunk_units, buffers] =
      plan_activation_buffers<G>(tokens, (units_of(p.k) + splits - 1) / splits);
  const int smem_bytes = gemm_w4_mma_smem_bytes<G>(tokens, chunk_units, buffers, splits);
  int log2_splits = 0;
  while ((1 << log2_splits) < splits) ++log2_splits;
  // Where the next launch starts at once, its first loads compete with the last ones of this one.
  // In short kernels that costs more than the head start gains: 4096 x 4096, M = 16: 5.7
  // against 6.7 us; M = 8, where the CTAs are smaller and there are more of them: 5.7 against 4.9
  // us.
  const bool late_trigger = G::kTokenTiles >= 2 && p.k <= 4096;
  const EpilogueArgs epilogue = make_epilogue_args(p);
  const GemmW4MmaLaunch arguments = {epilogue,     epilogue_is_plain(epilogue),
                                     p.x,          p.x_row_stride,
                                     p.weight,     p.k,
                                     token_tiles,  chunk_units,
                                     buffers,      log2_splits,
                                     late_trigger, p.weight_is_constant};

  const auto kernel = gemm_w4_mma_kernel<G>;
  if (smem_bytes > 48 * 1024) {
    PQ_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(token_tiles * row_tiles, splits, 1);
  launch.blockDim = dim3(G::kThreads, 1, 1);
  launch.dynamicSmemBytes = smem_bytes;
  launch.stream = stream;
  launch.attrs = attributes;
  if (splits > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs].val.clusterDim = {1, static_cast<unsigned>(splits), 1};
    ++launch.numAttrs;
  }
  if (p.weight_is_constant) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++launch.numAttrs;
  }
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, arguments));
}

}  // namespace prefixquant

#define PQ_MMA_GEOMETRY(bits, token_tiles, row_tiles, row_warps, k_warps, stages, nibble) \
  ::prefixquant::MmaGeometry<bits, token_tiles, row_tiles, row_warps, k_warps, stages, nibble>
#define PQ_EXTERN_GEMM_W4_MMA(...)                                                \
  extern template void launch_gemm_w4_mma_geometry<PQ_MMA_GEOMETRY(__VA_ARGS__)>( \
      const GemmW4Params&, int, cudaStream_t);
#define PQ_INSTANTIATE_GEMM_W4_MMA(...)                                                        \
  template void launch_gemm_w4_mma_geometry<PQ_MMA_GEOMETRY(__VA_ARGS__)>(const GemmW4Params&, \
                                                                          int, cudaStream_t);
