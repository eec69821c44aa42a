// SPDX-License-Identifier: Apache-2.0
//
// Config choice of the Hopper GEMM: a cost model over every compiled tile and every way to spread
// it over the SMs. Pure arithmetic: needs no CUDA.
#include <algorithm>

#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant {
namespace {

// A compiled tile (the list of gemm_w4_sm90_launch.cuh) and what it was measured to cost.
struct Tile {
  int weight_bits, rows, tokens, cluster, split;
  float us_per_stage;     // 128 k of one tile
  float us_per_tile;      // epilogue that the next tile does not hide
  float us_per_stream_k;  // partial sums through the workspace, once a launch
};

// Least squares over 2966 launches on an H100 SXM (132 SMs; 8 shapes of Llama-3 8B and 70B, M = 17
// .. 2048; `bench_gemm_w4 sweep`). Choosing by this table is 1.1 % slower than always choosing the
// fastest measured config, on average over the 152 (shape, M); 25 % at worst.
constexpr Tile kTiles[] = {
    {4, 128, 256, 2, 1, 0.683, 0.44, 9.7},  {4, 128, 192, 2, 1, 0.514, 0.47, 7.8},
    {4, 128, 128, 1, 1, 0.394, 0.00, 7.2},  {4, 128, 128, 1, 2, 0.362, 1.24, 0.0},
    {4, 128, 128, 2, 1, 0.375, 0.58, 5.7},  {4, 128, 96, 1, 1, 0.359, 0.00, 6.5},
    {4, 128, 96, 1, 2, 0.280, 1.80, 0.0},   {4, 256, 64, 1, 1, 0.478, 0.32, 8.0},
    {4, 128, 64, 1, 1, 0.286, 0.08, 5.3},   {4, 128, 64, 1, 2, 0.235, 1.52, 0.0},
    {4, 128, 64, 2, 1, 0.285, 0.23, 4.6},   {4, 256, 32, 1, 1, 0.381, 0.00, 6.3},
    {4, 128, 32, 1, 1, 0.233, 0.21, 4.2},   {4, 128, 32, 1, 2, 0.123, 0.98, 0.0},
    {4, 128, 16, 1, 1, 0.219, 0.54, 3.8},   {8, 128, 256, 2, 1, 0.750, 0.00, 12.5},
    {8, 128, 192, 2, 1, 0.620, 0.00, 10.1}, {8, 128, 128, 1, 1, 0.495, 0.00, 7.6},
    {8, 128, 128, 1, 2, 0.420, 1.50, 0.0},  {8, 128, 128, 2, 1, 0.443, 0.00, 7.7},
    {8, 128, 64, 1, 1, 0.372, 0.00, 5.3},   {8, 128, 64, 1, 2, 0.260, 1.50, 0.0},
    {8, 128, 32, 1, 1, 0.306, 0.00, 4.2},   {8, 128, 32, 1, 2, 0.170, 1.00, 0.0},
    {8, 128, 16, 1, 1, 0.275, 0.00, 4.4}};

constexpr float kLaunchUs = 3.0f;         // launch, first loads, last stores
constexpr float kMemoryLaunchUs = 3.5f;   // the same where memory is the limit
constexpr float kBytesPerUs = 3.05e6f;    // weights that come from memory once
constexpr float kStreamKPenalty = 1.03f;  // whole tiles where the two are about equal

int div_up(int a, int b) { return (a + b - 1) / b; }

// Estimated microseconds. `clusters` run at once; the last `stream_k_tiles` tiles are cut along K.
float estimate_us(const GemmW4Shape& shape, const Tile& tile, int tiles, int stream_k_tiles,
                  int clusters) {
  const int k_iterations = padded_k(shape.k) / kPackK;
  const int waves = div_up(tiles - stream_k_tiles, clusters);
  const bool stream_k = stream_k_tiles > 0;
  const int64_t stages =
      int64_t{waves} * div_up(k_iterations, tile.split) +
      (stream_k ? (int64_t{stream_k_tiles} * k_iterations + clusters - 1) / clusters : 0);
  const float reduction = stream_k ? tile.us_per_stream_k : 0.0f;
  const float compute = kLaunchUs + tile.us_per_stage * static_cast<float>(stages) +
                        tile.us_per_tile * static_cast<float>(waves + stream_k) + reduction;
  const float memory =
      kMemoryLaunchUs +
      static_cast<float>(prepacked_bytes(shape.n, shape.k, shape.weight_bits)) / kBytesPerUs +
      0.5f * reduction;
  // Where memory is the limit the tile with the most compute to spare is the better one.
  return (std::max(compute, memory) + 0.02f * compute) * (stream_k ? kStreamKPenalty : 1.0f);
}

}  // namespace

GemmW4Config choose_gemm_w4_sm90_config(const GemmW4Shape& shape, int sm_count) {
  GemmW4Config best;
  best.kernel = GemmW4Kernel::kWgmmaSm90;
  best.stages = 0;
  if (shape.m <= 0 || shape.n <= 0 || shape.k <= 0) return best;
  const int k_iterations = padded_k(shape.k) / kPackK;
  float best_us = 1e30f;
  for (const Tile& tile : kTiles) {
    if (tile.weight_bits != shape.weight_bits) continue;
    const int cluster_size = tile.cluster * tile.split;
    const int clusters = sm_count / cluster_size;
    const int tiles = div_up(shape.n, tile.rows * tile.cluster) * div_up(shape.m, tile.tokens);
    const auto consider = [&](int used, int stream_k_tiles) {
      const float us = estimate_us(shape, tile, tiles, stream_k_tiles, used);
      if (us >= best_us) return;
      best_us = us;
      best.block_rows = tile.rows;
      best.block_tokens = tile.tokens;
      best.cluster = tile.cluster;
      best.split_k = tile.split;
      best.grid = used * cluster_size;
      best.stream_k_tiles = stream_k_tiles;
    };
    if (tile.split > 1) {  // one tile a cluster
      if (tiles <= clusters && k_iterations >= 2 * tile.split) consider(tiles, 0);
      continue;
    }
    consider(std::min(tiles, clusters), 0);
    if (tiles < clusters) {
      for (int split = 2; split * tiles <= clusters && split * 2 <= k_iterations; ++split)
        consider(split * tiles, tiles);
      if (k_iterations * tiles >= 2 * clusters) consider(clusters, tiles);
    } else if (tiles % clusters != 0) {
      // The tiles of the last, incomplete wave, or those of the last two.
      const int rest = tiles % clusters;
      if (k_iterations * rest >= 2 * clusters) consider(clusters, rest);
      if (tiles >= clusters + rest) consider(clusters, clusters + rest);
    }
  }
  return best;
}

}  // namespace prefixquant
