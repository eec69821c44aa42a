// SPDX-License-Identifier: Apache-2.0
// Host side of the streaming GEMV: argument checks and the launch.
#include "prefixquant/gemm_w4_stream.cuh"

#include "prefixquant/check.h"

namespace prefixquant {
namespace {

int log2_of(int splits) {
  int log2 = 0;
  while ((1 << log2) < splits) ++log2;
  return log2;
}

void check_arguments(const GemmW4Params& p, const GemmW4Config& config) {
  PQ_REQUIRE(p.m <= kGemvStreamTokens, "gemm_w4: config: gemv_stream takes at most "
                                           << kGemvStreamTokens << " tokens, got " << p.m);
  PQ_REQUIRE(reinterpret_cast<uintptr_t>(p.x) % 16 == 0, "gemm_w4: x: expected 16-byte alignment");
  PQ_REQUIRE(p.x_row_stride % 16 == 0,
             "gemm_w4: x: expected a row stride that is a multiple of 16, got " << p.x_row_stride);
  PQ_REQUIRE(reinterpret_cast<uintptr_t>(p.weight) % 16 == 0,
             "gemm_w4: weight: expected 16-byte alignment");
  PQ_REQUIRE(p.k <= kMaxK16, "gemm_w4: k: expected at most " << kMaxK16 << ", got " << p.k);
  const int splits = config.split_k;
  PQ_REQUIRE(splits == 1 || splits == 2 || splits == 4 || splits == 8,
             "gemm_w4: config: expected split_k 1, 2, 4 or 8, got " << splits);
  PQ_REQUIRE(config.block_rows == kPackRows && config.block_tokens == kGemvStreamTokens,
             "gemm_w4: config: gemv_stream has tiles of 64x8, got " << config);
}

template <int WeightBits>
void launch(const GemmW4Params& p, const GemmW4Config& config, cudaStream_t stream) {
  using G = StreamGeometry<WeightBits>;
  const int splits = config.split_k;
  const int split_stages = stream_split_stages(p.k, splits);
  PQ_REQUIRE(config.stages <= 64 && is_stream_ring(config.stages, split_stages),
             "gemm_w4: config: expected a ring of 2 to 64 stages, an even number or at least the "
                 << split_stages << " of a split, got " << config.stages);
  const StreamSmem smem = plan_stream_smem(WeightBits, p.m, p.k, splits, config.stages);
  PQ_REQUIRE(smem.total <= kStreamSmemLimit,
             "gemm_w4: config: a ring of " << config.stages << " stages takes " << smem.total
                                           << " bytes of shared memory with the activations, more "
                                              "than the "
                                           << kStreamSmemLimit << " there are");
  const int row_tiles = (p.n + kPackRows - 1) / kPackRows;
  GemmW4StreamLaunch arguments = {};
  arguments.mma.epilogue = make_epilogue_args(p);
  arguments.mma.epilogue_is_plain = epilogue_is_plain(arguments.mma.epilogue);
  arguments.mma.x = p.x;
  arguments.mma.x_row_stride = p.x_row_stride;
  arguments.mma.weight = p.weight;
  arguments.mma.k = p.k;
  arguments.mma.log2_splits = log2_of(splits);
  arguments.mma.weight_is_constant = p.weight_is_constant;
  arguments.smem = smem;
  arguments.split_stages = split_stages;
  arguments.ring_stages = config.stages;
  arguments.release_stages = config.release_stages == 0 ? split_stages : config.release_stages;

  const auto kernel = gemm_w4_stream_kernel<G>;
  PQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem.total));
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(row_tiles, splits, 1);
  launch.blockDim = dim3(G::kThreads + 32, 1, 1);
  launch.dynamicSmemBytes = static_cast<size_t>(smem.total);
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

}  // namespace

void launch_gemm_w4_stream(const GemmW4Params& p, const GemmW4Config& config, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  check_arguments(p, config);
  if (p.weight_bits == 4) {
    launch<4>(p, config, stream);
  } else {
    launch<8>(p, config, stream);
  }
}

}  // namespace prefixquant
