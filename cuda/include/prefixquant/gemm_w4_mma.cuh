// SPDX-License-Identifier: Apache-2.0
// Computes y[m, n] = epilogue(sum_k x[m, k] w[n, k]) with mma.sync on int8 activations and int4 or
// int8 weights: the GEMV (M = 1), the skinny GEMM (M <= 64) and the kernel of every arch without
// wgmma. The weights are the 16-row operand (D^T = W X^T), so a few tokens waste no weight bytes.
//
// Layout  x: int8 [m, k] row-major, leading dimension ldx (multiple of 16), 16-byte aligned.
//         w: the prepacked layout of layout_w4.h, units of 16 rows x 64 k whose lane l owns bytes
//            16 l .. 16 l + 15: the four A registers of two k32 steps, step 0 in the low nibbles and
//            step 1 in the high ones (int8 weights: two such units of one k32 step each).
// Grid    x = token tiles x row tiles, y = k splits, one cluster along y.
//         A CTA owns 16 kRowTiles kRowWarps rows x 8 kTokenTiles tokens x one k split; its warps
//         divide the rows (kRowWarps) and, interleaved by 64 k, the split (kKWarps).
// Smem    max of the activation buffers, (tokens x (chunk_k + 16)) x (1 if the split fits, else 2),
//         and the int32 partial sums, kKWarps x tokens x (rows + 4) x 4 bytes.
//
// Weights never touch shared memory: each lane keeps kStages 16-byte loads per row tile in flight
// in registers. By Little's law 3.1 TB/s x ~700 ns needs 16.5 KB in flight per SM of an H100; one
// CTA of 8 warps with 8 loads has 32 KB. The activations of the whole split are fetched once, and
// then the warps run without a barrier.
//
// int4 weights are unpacked as 16 w (`v & 0xF0F0F0F0`, `(v << 4) & 0xF0F0F0F0`), so the sums are
// 16 times too large: |sum| <= 16 * 8 * 128 * k < 2^31 bounds k by 131071. The shift back is exact.
// Partial sums are int32 and exact, so no order of reduction can change a result.
#pragma once

#include "cp_async.cuh"
#include "mma.cuh"

namespace prefixquant {

// Compile-time geometry of one kernel.
template <int WeightBits,   // 4 or 8
          int TokenTiles,   // 8-token tiles of a CTA: 1, 2, 4 or 8
          int RowTiles,     // 16-row tiles of a warp
          int RowWarps,     // warps along the rows
          int KWarps,       // warps along k
          int Stages,       // units in flight per warp and row tile
          bool NibbleMma>   // multiply in int4 (sm_80/86/89): activations must be in [-8, 7]
struct MmaGeometry {
  static constexpr int kWeightBits = WeightBits;
  static constexpr int kTokenTiles = TokenTiles;
  static constexpr int kRowTiles = RowTiles;
  static constexpr int kRowWarps = RowWarps;
  static constexpr int kKWarps = KWarps;
  static constexpr int kStages = Stages;
  static constexpr bool kNibbleMma = NibbleMma;
  static constexpr int kThreads = 32 * RowWarps * KWarps;
  static constexpr int kRows = 16 * RowTiles * RowWarps;  // output channels of a CTA
  static constexpr int kTokens = 8 * TokenTiles;          // tokens of a CTA
  static constexpr int kLoads = WeightBits / 4;           // 16-byte loads per lane and unit
  static constexpr int kShift = (WeightBits == 4 && !NibbleMma) ? 4 : 0;
  // Pad so that the eight rows g of a fragment column pair 2t fall in distinct banks.
  static constexpr int kPartialStride = kRows + 4;

  static_assert(WeightBits == 4 || WeightBits == 8);
  static_assert(TokenTiles == 1 || TokenTiles == 2 || TokenTiles == 4 || TokenTiles == 8);
  static_assert(!NibbleMma || WeightBits == 4, "int4 MMA needs int4 weights");
  static_assert(kThreads <= 1024 && kThreads % kRows == 0 || kRows % kThreads == 0);
};

// Bytes of one token row of a buffer that holds `chunk_k` k: the 16-byte pad moves the 8 rows of
// an ldmatrix to distinct banks whether chunk_k is an odd or an even multiple of 64.
__host__ __device__ constexpr int mma_activation_stride(int chunk_k) { return chunk_k + 16; }
