// SPDX-License-Identifier: Apache-2.0
//
// The kernels of rmsnorm_hadamard.h.
//
// Layout: a row is one block [inputs, segment] of hadamard.cuh, `group` rows at a time. Warps take
//   tiles of 256 kVectors elements of one row: they add up the squares, multiply by the weight,
//   transform the segments in registers and put them into shared memory as float32. After a
//   barrier threads take columns, multiply the outputs by the row's rstd, subtract the shift and
//   write the levels.
// Grid: persistent CTAs that walk over the groups.
// Smem: 4 bytes an element of the group, 8 bytes a tile, 4 bytes a row.
// Limits: 16-bit x, weight and shift, 8 divides the segment, rows start at multiples of 16 bytes.
//   rmsnorm_hadamard_generic_kernel has none.
#pragma once

#include "prefixquant/hadamard.cuh"
#include "prefixquant/hadamard_generic.cuh"
#include "prefixquant/rms.cuh"
#include "prefixquant/rmsnorm_hadamard.h"

namespace prefixquant {

// Rows and tiles of a group, at most.
inline constexpr int kRmsnormHadamardRows = 64;
inline constexpr int kRmsnormHadamardTiles = 128;

// HadamardArgs with block_size = cols and one block a row.
struct RmsnormHadamardArgs : HadamardArgs {
  const uint16_t* weight;
  const uint16_t* shift;
  bool weight_is_bfloat16, shift_is_bfloat16;
  int vectors;                // of 8 elements, in a row
  FastDivisor tiles_per_row;  // of 256 kVectors elements
  double inv_cols, eps;
};

// What a group has in static shared memory.
struct RmsnormHadamardSums {
  double squares[kRmsnormHadamardTiles];  // of a tile
  float rstd[kRmsnormHadamardRows];
};

// The rows' segments and sums of squares.
template <int kVectors>
__device__ __forceinline__ void transform_rows(const RmsnormHadamardArgs& p,
                                               const ColumnStorage& storage, int64_t first_row,
                                               uint32_t rows, RmsnormHadamardSums& sums) {
  constexpr int kSegment = kVectors == 1 ? 0 : 256 * kVectors;
  const int lane = threadIdx.x % 32;
  const uint32_t tiles = rows * p.tiles_per_row.divisor, step = blockDim.x / 32;
  for (uint32_t tile = threadIdx.x / 32; tile < tiles; tile += step) {
    const uint32_t u = p.tiles_per_row.divide(tile);
    const int first = (tile - u * p.tiles_per_row.divisor) * 32 * kVectors + lane;
    const uint16_t* x = p.x + (first_row + u) * p.x_stride;
    RawTile<false, kVectors> raw;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      raw.clear(i);
      if (first + 32 * i < p.vectors) raw.load(i, x + 8 * (first + 32 * i), nullptr);
    }
    float v[kVectors][8];
    raw.values(p.is_bfloat16, v);
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sum = add_square(sum, v[i][e]);
      if (p.weight && first + 32 * i < p.vectors) {
        float w[8];
        to_floats(reinterpret_cast<const uint4*>(p.weight)[first + 32 * i], p.weight_is_bfloat16,
                  w);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[i][e] = __fmul_rn(v[i][e], w[e]);
      }
    }
    transform_tile<kSegment>(v, p.columns, lane);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + 32 * i < p.vectors) {
        store_vector(v[i], storage, u * p.vectors + first + 32 * i);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums.squares[tile] = sum;
  }
}

// y * rstd - shift
struct NormalizeOutputs {
  static constexpr bool kStaticLevels = true;
  const RmsnormHadamardArgs& p;
  const float* rstd;  // of the group's rows

  template <int kColumns, int kOutputs>
  __device__ __forceinline__ void operator()(float (&y)[kColumns][kOutputs], uint32_t u,
                                             uint32_t column) const {
    const float factor = rstd[u];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) y[c][i] = __fmul_rn(y[c][i], factor);
    }
    if (!p.shift) return;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i, advance(column, p.columns)) {
      uint32_t word;
      if constexpr (kColumns == 2) {
        word = *reinterpret_cast<const uint32_t*>(p.shift + column);
      } else {
        word = p.shift[column];
      }
      float s[2];
      if (p.shift_is_bfloat16) {
        unpack_pair(word, __nv_bfloat16{}, s[0], s[1]);
      } else {
        unpack_pair(word, __half{}, s[0], s[1]);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) y[c][i] = __fsub_rn(y[c][i], s[c]);
    }
  }
};

template <typename Sums, int kVectors, int kMaxThreads, int kCtasPerSm>
__global__ void __launch_bounds__(kMaxThreads, kCtasPerSm)
    rmsnorm_hadamard_kernel(const RmsnormHadamardArgs p) {
  __shared__ RmsnormHadamardSums sums;
  const ColumnStorage storage(p.group * p.block_size, p.log2_columns);
  grid_dependency_launch();
  const bool compiled_signs = signs_match<Sums::K>(p.signs);
  // Before the wait: L2 is where the writes of the kernel before arrive, nothing there is stale.
  prefetch_group(p, blockIdx.x * p.group);
  grid_dependency_wait();

  const Quantizer quantizer{__fdiv_rn(1.0f, load_float(p.scale)), p.qmin, p.qmax};
  const uint32_t all_rows = static_cast<uint32_t>(p.blocks), step = gridDim.x * p.group;
  for (uint32_t first = blockIdx.x * p.group; first < all_rows; first += step) {
    const uint32_t rows = min(static_cast<uint32_t>(p.group), all_rows - first);
    transform_rows<kVectors>(p, storage, first, rows, sums);
    __syncthreads();
    prefetch_group(p, first + step);
    if (threadIdx.x < rows) {
      const double* squares = sums.squares + threadIdx.x * p.tiles_per_row.divisor;
      double sum = squares[0];
      for (uint32_t i = 1; i < p.tiles_per_row.divisor; ++i) sum += squares[i];
      sums.rstd[threadIdx.x] = reciprocal_rms(sum, p.inv_cols, p.eps);
    }
    __syncthreads();
    uint32_t largest = 0;
    finish_columns<Sums, 1>(p, storage, first, rows, quantizer, compiled_signs, false, largest, 0,
                            NormalizeOutputs{p, sums.rstd});
    __syncthreads();  // before the next group overwrites the columns
  }
}

// Any size, dtype, alignment and sign matrix: one CTA a row, every stage through shared memory.
template <typename T>
__global__ void __launch_bounds__(kHadamardGenericThreads)
    rmsnorm_hadamard_generic_kernel(const RmsnormHadamardParams p, float norm, double inv_cols) {
  extern __shared__ float values[];
  __shared__ double squares[32];
  __shared__ uint32_t maxima[32];
  grid_dependency_launch();
  grid_dependency_wait();
  const RowHadamardParams& h = p.rows;
  const int cols = static_cast<int>(h.cols), pow2 = cols / static_cast<int>(h.k);
  const T* x = static_cast<const T*>(h.x) + blockIdx.x * h.x_stride;
  double sum = 0.0;
  for (int i = threadIdx.x; i < cols; i += kHadamardGenericThreads) {
    const float v = to_float(x[i]);
    sum = add_square(sum, v);
    values[i] = p.weight ? __fmul_rn(v, channel(p.weight, p.weight_dtype, i)) : v;
  }
  const float rstd = reciprocal_rms(block_sum(sum, squares), inv_cols, p.eps);
  generic_butterflies(values, cols, pow2);
  float factor = norm;
  if (hadamard_sums_are_integers(h.k)) factor = make_integers(values, cols, norm, maxima);
  const Quantizer quantizer{__fdiv_rn(1.0f, *h.scale), h.qmin, h.qmax};
  int8_t* const out = static_cast<int8_t*>(h.out) + blockIdx.x * h.cols;
  for (int i = threadIdx.x; i < cols; i += kHadamardGenericThreads) {
    const float y = __fmul_rn(generic_output(h, values, &factor, i, pow2, norm), rstd);
    const float centred = p.shift ? __fsub_rn(y, channel(p.shift, p.shift_dtype, i)) : y;
    out[i] = quantize(centred, quantizer);
  }
}

// ---- the compiled sums ----

// The most threads a CTA can have, and the CTAs an SM that the registers are bounded for.
struct RmsnormHadamardBounds {
  int threads, ctas;
};
constexpr RmsnormHadamardBounds rmsnorm_hadamard_bounds(int64_t k, int vectors) {
  if (k == 1 && vectors == 1) return {512, 2};
  return {256, k > 44 || (k == 1 && vectors == 4) ? 2 : 3};
}

using RmsnormHadamardKernel = void (*)(RmsnormHadamardArgs);

// The kernel for `vectors` of a lane, or nullptr where none is compiled. Specialized once each in
// src/inst/rmsnorm_hadamard_*.cu.
template <typename Sums>
RmsnormHadamardKernel rmsnorm_hadamard_instance(int vectors);

}  // namespace prefixquant
