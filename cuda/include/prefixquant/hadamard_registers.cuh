// SPDX-License-Identifier: Apache-2.0
//
// Hadamard transforms of 2^m elements, m up to 10: a warp takes tiles of 1024 elements and writes
// its vectors of 8 results itself.
// Grid: CTAs of 256 threads, eight tiles each.
// Limits: 16-bit inputs, 8 divides cols, rows start at multiples of 16 bytes.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/hadamard_row_args.h"
#include "prefixquant/hadamard_tile.cuh"
#include "prefixquant/quantizer.cuh"

namespace prefixquant {

// Of a CTA, at least: hadamard_sums_kernel has half as many again where two CTAs an SM are all that
// fit.
inline constexpr int kHadamardThreads = 256;

struct HadamardArgs : HadamardRowArgs {
  int cols;
  int columns;  // of a segment that a CTA has: all, or half where two share a block
  int log2_columns;
  int group;
  int64_t blocks;                 // of all rows
  FastDivisor vectors_per_block;  // block_size / 8
  int segment;  // NOTES: before `blocks` it makes ptxas spill 96 bytes in hadamard_sums_kernel
};

// k = 1, pow2 <= 1024, no dynamic scale. Any cols that 8 divides; tiles do not cross rows.
template <bool kSwiglu>
__global__ void __launch_bounds__(kHadamardThreads)
    hadamard_registers_kernel(const HadamardArgs p) {
  constexpr int kVectors = 4;
  const int lane = threadIdx.x % 32;
  const uint32_t tile = blockIdx.x * (kHadamardThreads / 32) + threadIdx.x / 32;
  const uint32_t tiles_per_row = p.vectors_per_block.divisor;
  const uint32_t row = p.vectors_per_block.divide(tile);
  grid_dependency_launch();
  if (row >= p.blocks) return;
  grid_dependency_wait();
  const int64_t first =
      static_cast<int64_t>(tile - row * tiles_per_row) * 256 * kVectors + 8 * lane;
  const uint16_t* x = p.x + row * p.x_stride;
  const uint16_t* up = p.up + row * p.up_stride;
  RawTile<kSwiglu, kVectors> raw;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = first + 256 * i;
    raw.clear(i);
    if (c < p.cols) raw.load(i, x + c, up + c);
  }
  float v[kVectors][8];
  raw.values(p.is_bfloat16, v);
  transform_tile<0>(v, p.segment, lane);
  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if (p.scaling == RowScale::kStatic) quantizer.inv_scale = __fdiv_rn(1.0f, *p.scale);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t c = first + 256 * i;
    if (c >= p.cols) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) v[i][e] = __fmul_rn(v[i][e], p.norm);
    const int64_t at = row * static_cast<int64_t>(p.cols) + c;
    if (p.scaling == RowScale::kStatic) {
      *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.out) + at) = quantize8(v[i], quantizer);
    } else if (p.is_bfloat16) {
      RawVector<__nv_bfloat16> raw;
      from_floats(v[i], raw);
      raw.store(static_cast<__nv_bfloat16*>(p.out) + at);
    } else {
      RawVector<__half> raw;
      from_floats(v[i], raw);
      raw.store(static_cast<__half*>(p.out) + at);
    }
  }
}

}  // namespace prefixquant
