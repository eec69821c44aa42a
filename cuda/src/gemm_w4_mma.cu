// SPDX-License-Identifier: Apache-2.0
// Host side of the mma.sync kernel: argument checks and the dispatch from a config to a geometry.
// The int4 MMA of sm_80/86/89 (W4A4) is the same kernel on the same weight layout; only its
// instruction differs.
#include "prefixquant/gemm_w4_mma_launch.cuh"

namespace prefixquant {

PQ_GEMM_W4_MMA_W4(PQ_EXTERN_GEMM_W4_MMA)
PQ_GEMM_W4_MMA_W8(PQ_EXTERN_GEMM_W4_MMA)
PQ_GEMM_W4_MMA_S4(PQ_EXTERN_GEMM_W4_MMA)

namespace {

void check_arguments(const GemmW4Params& p, const GemmW4Config& config) {
  PQ_REQUIRE(reinterpret_cast<uintptr_t>(p.x) % 16 == 0, "gemm_w4: x: expected 16-byte alignment");
  PQ_REQUIRE(p.x_row_stride % 16 == 0,
             "gemm_w4: x: expected a row stride that is a multiple of 16, got " << p.x_row_stride);
  PQ_REQUIRE(reinterpret_cast<uintptr_t>(p.weight) % 16 == 0,
             "gemm_w4: weight: expected 16-byte alignment");
  PQ_REQUIRE(p.k <= kMaxK16, "gemm_w4: k: expected at most " << kMaxK16 << ", got " << p.k);
  const int splits = config.split_k;
  PQ_REQUIRE(splits == 1 || splits == 2 || splits == 4 || splits == 8,
             "gemm_w4: config: expected split_k 1, 2, 4 or 8, got " << splits);
}

// Programmatic dependent launch exists from sm_90 on; elsewhere launches simply follow each other.
GemmW4Params without_overlap_before_hopper(GemmW4Params p) {
  int device = 0, major = 0;
  PQ_CUDA_CHECK(cudaGetDevice(&device));
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  p.weight_is_constant = p.weight_is_constant && major >= 9;
  return p;
}

bool same(const GemmW4Config& config, int rows, int tokens, int stages) {
  return config.block_rows == rows && config.block_tokens == tokens && config.stages == stages;
}

[[noreturn]] void throw_unknown(const GemmW4Config& config, int weight_bits) {
  std::ostringstream message;
  message << "gemm_w4: config: no mma kernel of " << weight_bits << "-bit weights is compiled for "
          << config;
  throw std::invalid_argument(message.str());
}

#define PQ_LAUNCH_IF(bits, token_tiles, row_tiles, row_warps, k_warps, stages, nibble)            \
  if (p.weight_bits == bits &&                                                                    \
      same(config, 16 * row_tiles * row_warps, 8 * token_tiles, stages)) {                        \
    launch_gemm_w4_mma_geometry<PQ_MMA_GEOMETRY(bits, token_tiles, row_tiles, row_warps, k_warps, \
                                                stages, nibble)>(p, config.split_k, stream);      \
    return;                                                                                       \
  }

}  // namespace

void launch_gemm_w4_mma(const GemmW4Params& params, const GemmW4Config& config,
                        cudaStream_t stream) {
  if (params.m == 0 || params.n == 0) return;
  check_arguments(params, config);
  const GemmW4Params p = without_overlap_before_hopper(params);
  PQ_GEMM_W4_MMA_W4(PQ_LAUNCH_IF)
  PQ_GEMM_W4_MMA_W8(PQ_LAUNCH_IF)
  throw_unknown(config, p.weight_bits);
}

void launch_gemm_w4_sm80(const GemmW4Params& params, const GemmW4Config& config,
                         cudaStream_t stream) {
  if (params.m == 0 || params.n == 0) return;
  check_arguments(params, config);
  const GemmW4Params p = without_overlap_before_hopper(params);
  PQ_GEMM_W4_MMA_S4(PQ_LAUNCH_IF)
  throw_unknown(config, p.weight_bits);
}

}  // namespace prefixquant
