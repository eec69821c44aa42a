// SPDX-License-Identifier: Apache-2.0
//
// Config choice of the mma.sync kernel: which compiled geometry (gemm_w4_mma_launch.cuh) and how
// many k splits. Pure arithmetic: needs no CUDA.
//
// Measured on an H100 (132 SMs), int4 weights, microseconds; T = tiles of 64 rows. "64 rows" has 16
// warps, 4 of them along k; "128 rows" 8 warps, 2 along k.
//   M = 1   T x splits         64 rows / 4 k-warps      64 rows / 2 k-warps, 8 stages
//     4096 x 4096   (T 64)     x2  5.15                 x4  4.24   x2  5.73
//     6144 x 4096   (T 96)     x2  6.01                 x2  7.12   x4  7.71
//     8192 x 8192   (T 128)    x2 12.40   x1 14.09      x4 13.95
//     10240 x 8192  (T 160)    x1 18.54   x2 18.10      x4 15.67   x2 16.34
//     28672 x 4096  (T 448)    x1 20.45   x2 21.69      x2 20.59   x4 22.29
//     57344 x 8192  (T 896)    x1 77.87   x2 77.50      x4 76.36   x2 77.82
//     4096 x 14336  (T 64)     x2 13.05                 x4 12.26   16 rows / 4 k-warps: x4 11.58
//   M = 16                     64 rows                  128 rows
//     4096 x 14336  (T 64)     x2 14.08   x4 17.65      x4 14.66
//     10240 x 8192  (T 160)    x1 19.86   x2 21.54      x2 19.22   x4 21.94
//     28672 x 4096  (T 448)    x1 23.68                 x1 23.16   x2 25.31
//   M = 32
//     4096 x 4096   (T 64)     x2  7.54                 x4  9.22
//     6144 x 4096   (T 96)     x2 13.25                 x4  9.77
//     8192 x 8192   (T 128)    x1 18.20                 x2 17.70
//   M = 64                                                             256 rows
//     4096 x 4096   (T 64)     x2 10.71                 x4 18.11
//     28672 x 4096  (T 448)    x1 57.0                  x1 40.7        x1 32.7
// The pattern: fill the SMs once, with as few splits as do that, and leave no small second wave.
#include <algorithm>

#include "prefixquant/gemm_w4.h"

namespace prefixquant {
namespace {

int div_up(int a, int b) { return (a + b - 1) / b; }

struct Choice {
  int rows;
  int k_warps;
  int stages;  // with int4 weights
  int splits;
};

Choice choose_gemv(int tokens, int n, int k, int sm_count) {
  const int tiles = div_up(n, 64);
  // Few rows and long k. Many small CTAs read the activations many times: not from M = 4 on.
  if (tokens <= 2 && 2 * tiles <= sm_count && k >= 8192) return {16, 4, 8, 4};
  for (const int splits : {1, 2}) {  // one wave of two CTAs of 16 warps an SM, nearly full
    const int ctas = tiles * splits;
    if (ctas >= sm_count * 7 / 5 && ctas <= 2 * sm_count) return {64, 4, 4, splits};
  }
  if (tiles >= 3 * sm_count && k < 8192) return {64, 4, 4, 1};
  int splits = tiles * 4 <= 5 * sm_count || k >= 8192 ? 4 : 2;
  if (tiles * 4 < sm_count) splits = 8;
  return {64, 2, 8, splits};
}

Choice choose_skinny(int n, int tokens, int sm_count) {
  const int tiles64 = div_up(n, 64), tiles128 = div_up(n, 128), tiles256 = div_up(n, 256);
  // 64 rows of 32 or 64 tokens need more than 64 registers a lane: one CTA of 16 warps an SM.
  if (tokens == 16 ? tiles64 <= sm_count : 2 * tiles64 <= sm_count) {
    int splits = 2;
    while (splits < 8 && 10 * tiles64 * splits < 9 * sm_count) splits *= 2;
    return {64, 4, 4, splits};
  }
  if (tokens == 64 && 10 * tiles256 >= 8 * sm_count) return {256, 1, 4, 1};
  const int ctas_per_sm = tokens == 64 ? 1 : 2;
  int splits = 1;
  while (splits < 4 && tiles128 * splits * 2 <= ctas_per_sm * sm_count) splits *= 2;
  return {128, 2, 4, splits};
}

// Every k-warp should find at least two units of 64 k in its split.
int limit_splits(const Choice& choice, int k, int arch) {
  if (arch < 90) return 1;  // splits meet through the shared memory of a cluster
  int splits = choice.splits;
  while (splits > 1 && div_up(k, 64) < 2 * choice.k_warps * splits) splits /= 2;
  return splits;
}

}  // namespace

GemmW4Config choose_gemm_w4_mma_config(const GemmW4Shape& shape, int sm_count, int arch) {
  GemmW4Config config;
  int tokens = 8;
  while (tokens < shape.m && tokens < 64) tokens *= 2;
  Choice choice = tokens == 8 ? choose_gemv(shape.m, shape.n, shape.k, sm_count)
                              : choose_skinny(shape.n, tokens, sm_count);
  // Many tokens: the largest tile. Before sm_90 an SM may have only 99 KB of shared memory, which
  // the 64 x 64 and 256 x 64 tiles exceed.
  if (shape.m > 64) {
    tokens = 128;
    choice = {128, 1, 4, 1};
  } else if (tokens == 64 && arch < 90) {
    choice = {128, 2, 4, 1};
  }
  config.kernel = shape.m <= 8    ? GemmW4Kernel::kGemv
                  : shape.m <= 64 ? GemmW4Kernel::kMmaSkinny
                                  : GemmW4Kernel::kMmaTiled;
  config.block_rows = choice.rows;
  config.block_tokens = tokens;
  config.stages = shape.weight_bits == 8 ? choice.stages / 2 : choice.stages;
  config.split_k = limit_splits(choice, shape.k, arch);
  config.cluster = config.split_k;
  config.grid = div_up(shape.n, choice.rows) * div_up(shape.m, tokens) * config.split_k;
  return config;
}

// Splits meet in shared memory: no workspace.
size_t gemm_w4_mma_workspace_bytes(const GemmW4Shape&, const GemmW4Config&) { return 0; }

GemmW4Config choose_gemm_w4_sm80_config(const GemmW4Shape& shape, int) {
  GemmW4Config config;
  int tokens = 8;
  while (tokens < shape.m && tokens < 128) tokens *= 2;
  config.kernel = GemmW4Kernel::kMmaInt4Sm80;
  config.block_rows = tokens == 8 ? 64 : 128;
  config.block_tokens = tokens;
  config.stages = tokens == 8 ? 8 : 4;
  config.split_k = 1;
  config.cluster = 1;
  config.grid = div_up(shape.n, config.block_rows) * div_up(shape.m, tokens);
  return config;
}

size_t gemm_w4_sm80_workspace_bytes(const GemmW4Shape&, const GemmW4Config&) { return 0; }

}  // namespace prefixquant
