// SPDX-License-Identifier: Apache-2.0
//
// Config choice of the Hopper GEMM: a small cost model over every compiled tile and every way to
// spread it over the SMs. Pure arithmetic: needs no CUDA.
#include <algorithm>

#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant {
namespace {

struct Tile {
  int weight_bits, rows, tokens, cluster, split;
};
// The list of gemm_w4_sm90_launch.cuh.
constexpr Tile kTiles[] = {
    {4, 128, 256, 1, 1}, {4, 128, 256, 2, 1}, {4, 128, 192, 2, 1}, {4, 128, 128, 1, 1},
    {4, 128, 128, 2, 1}, {4, 128, 128, 1, 2}, {4, 128, 128, 1, 4}, {4, 128, 96, 1, 1},
    {4, 128, 96, 1, 2}, {4, 256, 64, 1, 1}, {4, 128, 64, 1, 1}, {4, 128, 64, 2, 1},
    {4, 128, 64, 1, 2}, {4, 128, 64, 1, 4}, {4, 256, 32, 1, 1}, {4, 128, 32, 1, 1},
    {4, 128, 32, 1, 2}, {4, 128, 16, 1, 1}, {8, 128, 256, 1, 1}, {8, 128, 256, 2, 1},
    {8, 128, 192, 2, 1}, {8, 128, 128, 1, 1}, {8, 128, 128, 2, 1}, {8, 128, 128, 1, 2},
    {8, 128, 64, 1, 1}, {8, 128, 64, 1, 2}, {8, 128, 64, 1, 4}, {8, 128, 32, 1, 1},
    {8, 128, 32, 1, 2}, {8, 128, 16, 1, 1}};

int div_up(int a, int b) { return (a + b - 1) / b; }

// Cycles of one SM (about 1.6 GHz under load).
double cost(const GemmW4Shape& shape, const Tile& tile, int clusters, int stream_k_tiles,
            int used_clusters, int sm_count) {
  const int k_iterations = padded_k(shape.k) / kPackK;
  const int row_tiles = div_up(shape.n, tile.rows * tile.cluster);
  const int token_tiles = div_up(shape.m, tile.tokens);
  const int tiles = row_tiles * token_tiles;
  const int whole = tiles - stream_k_tiles;

  // A stage: 4096 MACs a cycle, 85 % of them in practice; its bytes at 40 a cycle from L2; its
  // weights at the SM's share of 3.0 TB/s when they are read once.
  const double mma = double(tile.rows) * tile.tokens * kPackK / 4096 / 0.85;
  const double w_bytes = double(tile.rows) * kPackK * tile.weight_bits / 8;
  const double x_bytes = double(tile.tokens) * kPackK / tile.cluster;
  const double l2 = (w_bytes + x_bytes) / 36;
  const double dram = w_bytes / token_tiles / 14.0 * used_clusters * tile.cluster / sm_count;
  const double stage = std::max({mma, l2, dram, 120.0});

  const double whole_tiles = div_up(whole, used_clusters);
  const double stream_k_iterations =
      double(div_up(stream_k_tiles * k_iterations, used_clusters));
  const double epilogue = 300 + double(tile.rows) * tile.tokens / 64;
  double cycles = 3500 + (whole_tiles * k_iterations + stream_k_iterations) * stage;
  cycles += whole_tiles * epilogue * 0.5 + (stream_k_tiles > 0 ? epilogue : 0);
  if (stream_k_tiles > 0) {
    // Leaving a part and adding up those of the others, at about 24 bytes a cycle.
    const double parts = double(used_clusters) / stream_k_tiles;
    cycles += 1500 + (1 + std::min(parts, 4.0)) * tile.rows * tile.tokens * 4 / 24 / 2;
  }
  (void)clusters;
  return cycles;
}

}  // namespace

GemmW4Config choose_gemm_w4_sm90_config(const GemmW4Shape& shape, int sm_count) {
  GemmW4Config best;
  best.kernel = GemmW4Kernel::kWgmmaSm90;
  best.stages = 0;
  if (shape.m <= 0 || shape.n <= 0 || shape.k <= 0) return best;
  const int k_iterations = padded_k(shape.k) / kPackK;
  double best_cost = 1e30;
  for (const Tile& tile : kTiles) {
    if (tile.weight_bits != shape.weight_bits) continue;
    const int clusters = sm_count / tile.cluster;
    const int tiles =
        div_up(shape.n, tile.rows * tile.cluster) * div_up(shape.m, tile.tokens);
    const auto consider = [&](int used, int stream_k_tiles) {
      const double c = cost(shape, tile, clusters, stream_k_tiles, used, sm_count);
      if (c >= best_cost) return;
      best_cost = c;
      best.block_rows = tile.rows;
      best.block_tokens = tile.tokens;
      best.cluster = tile.cluster;
      best.grid = used * tile.cluster;
      best.stream_k_tiles = stream_k_tiles;
    };
    consider(std::min(tiles, clusters), 0);
    if (tiles < clusters) {
      for (int split = 2; split * tiles <= clusters && split * 2 <= k_iterations; ++split)
        consider(split * tiles, tiles);
      if (k_iterations * tiles >= 2 * clusters) consider(clusters, tiles);
    } else if (tiles % clusters != 0) {
      const int rest = tiles % clusters;
      consider(clusters, rest);
      if (tiles >= clusters + rest) consider(clusters, clusters + rest);
    }
  }
  return best;
}

}  // namespace prefixquant
