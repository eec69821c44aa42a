// SPDX-License-Identifier: Apache-2.0
//
// Host side of the Hopper GEMM: argument checks, tensor map of the activations, tile dispatch.
// Config choice is in gemm_w4_sm90_config.cpp, which a machine without CUDA can run.
#include <cuda.h>

#include <algorithm>

#include "prefixquant/gemm_w4_sm90_launch.cuh"

namespace prefixquant {

#define X(bits, m64, tokens, cluster, split) \
  PQ_EXTERN_GEMM_W4_SM90(bits, m64, tokens, cluster, split)
PQ_GEMM_W4_SM90_TILES(X)
#undef X

namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time: the library links the static runtime only.
EncodeTiled tensor_map_encoder() {
  static const EncodeTiled encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    PQ_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                   cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || function == nullptr)
      throw std::runtime_error("gemm_w4: the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return encoder;
}

// Boxes of 128 bytes of K x `box_tokens` rows of x, swizzled as wgmma reads them.
CUtensorMap make_x_map(const GemmW4Params& p, int box_tokens) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.m)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(p.x_row_stride)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_tokens)};
  const cuuint32_t element_strides[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(p.x), sizes, strides, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "gemm_w4: cuTensorMapEncodeTiled failed with CUresult " << result << " for x ["
            << p.m << ", " << p.k << "], row stride " << p.x_row_stride;
    throw std::runtime_error(message.str());
  }
  return map;
}

int div_up(int a, int b) { return (a + b - 1) / b; }

// Cluster tiles of a shape under a config, and the sizes that follow.
struct TileGrid {
  int row_tiles;
  int token_tiles;
  int tiles() const { return row_tiles * token_tiles; }
};
TileGrid tile_grid(const GemmW4Shape& shape, const GemmW4Config& config) {
  return {div_up(shape.n, config.block_rows * config.cluster),
          div_up(shape.m, config.block_tokens)};
}

}  // namespace

size_t gemm_w4_sm90_workspace_bytes(const GemmW4Shape&, const GemmW4Config& config) {
  if (config.stream_k_tiles == 0) return 0;
  // Two parts of a tile a CTA: of the first and of the last tile of its range.
  return kGemmW4CounterBytes +
         size_t{2} * config.grid * config.block_rows * config.block_tokens * sizeof(int32_t);
}

void launch_gemm_w4_sm90(const GemmW4Params& p, const GemmW4Config& config, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  PQ_REQUIRE(p.k >= 16 && p.k <= kMaxK16,
             "gemm_w4: k must be in 16.." << kMaxK16 << ", got " << p.k);
  PQ_REQUIRE(reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_row_stride % 16 == 0,
             "gemm_w4: x must have 16-byte aligned rows, got a row stride of " << p.x_row_stride);
  PQ_REQUIRE(config.stream_k_tiles == 0 || p.workspace != nullptr,
             "gemm_w4: this config needs a workspace");
  const GemmW4Shape shape{p.m, p.n, p.k, p.weight_bits};
  const TileGrid grid = tile_grid(shape, config);
  PQ_REQUIRE(config.grid > 0 && config.grid % config.cluster == 0 &&
                 config.stream_k_tiles <= grid.tiles() &&
                 config.stream_k_tiles * config.cluster * 2 * sizeof(int) <= kGemmW4CounterBytes,
             "gemm_w4: config does not fit the shape");
  PQ_REQUIRE(config.split_k == 1 ||
                 (config.stream_k_tiles == 0 && config.grid == grid.tiles() * config.split_k &&
                  padded_k(p.k) / kPackK >= config.split_k),
             "gemm_w4: a split config needs one cluster a tile and k for every part");

  GemmW4Sm90Args args = {};
  args.weight = static_cast<const uint8_t*>(p.weight);
  args.epilogue = make_epilogue_args(p);
  args.k_iterations = padded_k(p.k) / kPackK;
  args.row_groups = padded_rows(p.n) / kPackRows;
  args.row_tiles = grid.row_tiles;
  args.token_tiles = grid.token_tiles;
  // About 2048 tokens: with 132 CTAs a wave is then roughly square, which is what L2 likes best.
  args.token_tile_group = std::max(1, 2048 / config.block_tokens);
  args.stream_k_tiles = config.stream_k_tiles;
  args.dp_tiles = grid.tiles() - config.stream_k_tiles;
  args.counters = static_cast<int*>(p.workspace);
  args.partials = reinterpret_cast<int4*>(static_cast<uint8_t*>(p.workspace) + kGemmW4CounterBytes);
  const CUtensorMap x_map = make_x_map(p, config.block_tokens / config.cluster);

#define X(bits, m64, tokens, cluster_size, split)                                                 \
  if (p.weight_bits == bits && config.block_rows == 128 * m64 && config.block_tokens == tokens && \
      config.cluster == cluster_size && config.split_k == split)                                  \
    return launch_gemm_w4_sm90_tile<GemmW4Sm90Traits<bits, m64, tokens, cluster_size, split>>(    \
        x_map, args, config.grid, stream);
  PQ_GEMM_W4_SM90_TILES(X)
#undef X
  PQ_REQUIRE(false, "gemm_w4: no Hopper kernel for "
                        << p.weight_bits << "-bit weights, tile " << config.block_rows << "x"
                        << config.block_tokens << ", cluster " << config.cluster << ", split "
                        << config.split_k);
}

}  // namespace prefixquant
