// SPDX-License-Identifier: Apache-2.0
// The AMX kernel of the low-bit GEMM, for more than a few rows.
//
// Computes the raw sums of dot_tile (gemm_dot_tile.h) for rows [m0, m1) and one or two blocks of 16
// outputs: tiles of 16 rows x 16 outputs, K in steps of 64, 2 x 2 tiles at a time, so that every
// tile loaded is used twice (8 cycles a load, 16 a product).
//   A tile: 16 rows x 64 bytes of x as it lies in memory.
//   B tile: 16 groups of 4 inputs x (16 outputs x 4 inputs): 16 consecutive vpdpbusd registers of
//   the
//           prepacked weight, K / 4 of them a block. 8-bit weights are read in place; 4-bit ones
//           are unpacked once into a panel of the thread and used for all rows.
// Weights are unsigned here too: _tile_dpbsud multiplies signed x by unsigned w.
#pragma once

#include <immintrin.h>

#include "gemm_dot_tile.h"
#include "gemm_epilogue.h"

PQ_ISA_NAMESPACE_BEGIN

// From here on a tile product beats the AVX-512 kernel, whose cost grows with every row.
constexpr int64_t kAmxMinRows = 8;
constexpr int64_t kTileSide = 16;
constexpr int64_t kStepBytes = kTileSide * 64;  // one B tile
constexpr int64_t kTileGroupBytes = 128;        // 8 inputs x 16 outputs in B tiles
constexpr int64_t kPanelBytes = 1 << 20;        // B tiles kept at a time: half of a 2 MB L2

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums (row half, output block) = (t / 2, t % 2). 4, 5: x of the two row halves. 6, 7:
// weights.
static void configure_tiles(int64_t rows0, int64_t rows1) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    const bool second_half = t == 2 || t == 3 || t == 5;
    const int64_t rows = t >= 6 ? kTileSide : second_half ? rows1 : rows0;
    config.rows[t] = static_cast<uint8_t>(rows > 0 ? rows : 1);
    config.row_bytes[t] = 64;
  }
  _tile_loadconfig(&config);
}

// sum [32, 32] of up to 32 rows of x and one or two blocks. x_tail: the last, zero-padded step of
// these rows, nullptr where 64 divides K.
template <bool TWO_HALVES, bool TWO_BLOCKS>
static void multiply_tiles(const int8_t* x, int64_t x_stride, const int8_t* x_tail, int64_t steps,
                           const uint8_t* b0, const uint8_t* b1, int32_t* sum) {
  _tile_zero(0);
  if constexpr (TWO_BLOCKS) _tile_zero(1);
  if constexpr (TWO_HALVES) _tile_zero(2);
  if constexpr (TWO_HALVES && TWO_BLOCKS) _tile_zero(3);
  const auto step = [&](const int8_t* a, int64_t stride, int64_t s) {
    _tile_loadd(6, b0 + s * kStepBytes, 64);
    _tile_loadd(4, a, stride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (TWO_BLOCKS) {
      _tile_loadd(7, b1 + s * kStepBytes, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (TWO_HALVES) {
      _tile_loadd(5, a + kTileSide * stride, stride);
      _tile_dpbsud(2, 5, 6);
      if constexpr (TWO_BLOCKS) _tile_dpbsud(3, 5, 7);
    }
  };
  for (int64_t s = 0; s < steps; ++s) step(x + s * kPadInputs, x_stride, s);
  if (x_tail) step(x_tail, kPadInputs, steps);

  constexpr int64_t kSumStride = 2 * kTileSide * sizeof(int32_t);
  _tile_stored(0, sum, kSumStride);
  if constexpr (TWO_BLOCKS) _tile_stored(1, sum + kTileSide, kSumStride);
  if constexpr (TWO_HALVES) _tile_stored(2, sum + 2 * kTileSide * kTileSide, kSumStride);
  if constexpr (TWO_HALVES && TWO_BLOCKS) {
    _tile_stored(3, sum + 2 * kTileSide * kTileSide + kTileSide, kSumStride);
  }
}

// B tiles of `groups` groups (of any number of blocks), in place (8-bit) or unpacked into `panel`.
template <class Weight>
static const uint8_t* tile_panel(const uint8_t* weight, int64_t groups, uint8_t* panel) {
  if constexpr (Weight::kGroupBytes == kTileGroupBytes) {
    return weight;
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      __m512i k0, k4;
      Weight::load(weight + g * Weight::kGroupBytes, &k0, &k4);
      _mm512_store_si512(panel + g * kTileGroupBytes, k0);
      _mm512_store_si512(panel + g * kTileGroupBytes + 64, k4);
    }
    return panel;
  }
}

// Rows [i, i + rows) (at most 32) and one or two blocks, of which B tiles begin at b0 and b1.
template <class Weight>
static void compute_tile(const GemmParams& p, int64_t i, int64_t rows, const uint8_t* b0,
                         const uint8_t* b1, int64_t n0, const OutputFactors& factors,
                         FinishTile* finish) {
  alignas(64) int32_t sum[2 * kTileSide * 2 * kTileSide];
  const int8_t* x_tail = p.k % kPadInputs ? p.x_tail + i * kPadInputs : nullptr;
  const auto multiply = rows > kTileSide
                            ? (b1 ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                            : (b1 ? multiply_tiles<false, true> : multiply_tiles<false, false>);
  multiply(p.x + i * p.k, p.k, x_tail, p.k / kPadInputs, b0, b1, sum);
  finish(p, factors, Weight::kOffset, sum, 2 * kTileSide, rows, b1 ? 2 : 1, i, n0);
}

// As compute_rows of gemm_driver.h, for any number of blocks. They are taken in chunks whose B
// tiles fit L2; within a chunk the 32 rows of a tile stay in L1 while the chunk's tiles pass, and y
// is written along its rows, a page at a time (writing down its columns cost more than the
// products).
template <class Weight>
static void compute_rows_amx(const GemmParams& p, int64_t m0, int64_t m1, int64_t block0,
                             int64_t blocks) {
  const int64_t groups = (p.k + kPadInputs - 1) / kPadInputs * (kPadInputs / kGroupInputs);
  const int64_t tile_bytes = groups * kTileGroupBytes;  // of the B tiles of one block
  int64_t chunk = kPanelBytes / tile_bytes / 2 * 2;
  if (chunk < 2) chunk = 2;
  if (chunk > blocks) chunk = blocks;
  const int64_t panel_bytes = Weight::kGroupBytes == kTileGroupBytes ? 0 : chunk * tile_bytes;
  const int64_t factor_bytes = chunk * kBlockOutputs * 2 * static_cast<int64_t>(sizeof(float));
  auto* scratch =
      static_cast<uint8_t*>(thread_scratch(ScratchSlot::kPanel, panel_bytes + factor_bytes));
  auto* factor_storage = reinterpret_cast<float*>(scratch + panel_bytes);
  FinishTile* finish = pick_finish_tile(p.output_dtype);

  int64_t configured = 0;
  for (int64_t first = 0; first < blocks; first += chunk) {
    const int64_t count = blocks - first < chunk ? blocks - first : chunk;
    const int64_t n0 = (block0 + first) * kBlockOutputs;
    const uint8_t* panel = tile_panel<Weight>(
        p.weight + (block0 + first) * groups * Weight::kGroupBytes, count * groups, scratch);
    const OutputFactors factors = load_factors(p, n0, count * kBlockOutputs, factor_storage);
    for (int64_t i = m0; i < m1; i += 2 * kTileSide) {
      const int64_t rows = m1 - i < 2 * kTileSide ? m1 - i : 2 * kTileSide;
      if (rows != configured) {
        configure_tiles(rows < kTileSide ? rows : kTileSide, rows - kTileSide);
        configured = rows;
      }
      for (int64_t b = 0; b < count; b += 2) {
        compute_tile<Weight>(p, i, rows, panel + b * tile_bytes,
                             b + 1 < count ? panel + (b + 1) * tile_bytes : nullptr,
                             n0 + b * kBlockOutputs, factors.after(b * kBlockOutputs), finish);
      }
    }
  }
  _tile_release();
}

PQ_ISA_NAMESPACE_END
