// SPDX-License-Identifier: Apache-2.0
//
// The kernels of rmsnorm_hadamard.h.
//
// Layout: a row is one block [inputs, segment] of hadamard.cuh, `group` rows at a time. Warps take
//   tiles of 256 kVectors elements: they add up squares, multiply by the weight, transform the
//   segments in registers and put them into shared memory as float32. After a barrier each row's
//   squares are summed by a warp; after another one threads take columns, multiply the outputs by
//   the row's rstd, subtract the shift and write the levels.
// Grid: persistent CTAs that walk over the groups.
// Smem: 4 bytes an element of the group; 8 bytes of sums for each thread that has elements of one
//   row, at most a quarter of that.
// Limits: 16-bit x, weight and shift, 8 divides the segment, rows start at multiples of 16 bytes.
//   rmsnorm_hadamard_generic_kernel has none.
#pragma once

#include "prefixquant/hadamard.cuh"
#include "prefixquant/hadamard_generic.cuh"
#include "prefixquant/rms.cuh"
#include "prefixquant/rmsnorm_hadamard.h"

namespace prefixquant {

// Rows of a group, at most.
inline constexpr int kRmsnormHadamardRows = 64;

// HadamardArgs with block_size = cols and one block a row.
struct RmsnormHadamardArgs : HadamardArgs {
  const uint16_t* weight;
  const uint16_t* shift;
  bool weight_is_bfloat16, shift_is_bfloat16;
  uint32_t squares_at;  // where the sums of squares begin in shared memory, in float64
  double inv_cols, eps;
};

// The elements of a lane in a tile. kSegment: the length of the segments where tiles never cross
// rows; otherwise 0, and the last tile may be cut.
template <int kVectors, int kSegment>
struct RowTile {
  static constexpr bool kWhole = kSegment > 0;
  // Sums of squares that a row has.
  __device__ __forceinline__ static uint32_t sums_of_row(const RmsnormHadamardArgs& p) {
    return p.vectors_per_block.divisor / (kWhole ? kVectors : 1);
  }

  uint32_t flat;          // of vector 0 in the group; vector i is 32 i further
  uint32_t at[kVectors];  // in the row
  bool inside[kVectors];
  float v[kVectors][8];

  __device__ __forceinline__ RowTile(const RmsnormHadamardArgs& p, int64_t first_row, uint32_t tile,
                                     uint32_t count)
      : flat(tile + threadIdx.x % 32) {
    RawTile<false, kVectors> raw;
    uint32_t u = p.vectors_per_block.divide(kWhole ? tile : flat);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t vector = flat + 32 * i;
      inside[i] = kWhole || vector < count;
      if (!kWhole && i > 0) u = p.vectors_per_block.divide(vector);
      at[i] = vector - u * p.vectors_per_block.divisor;
      if constexpr (!kWhole) raw.clear(i);
      if (inside[i]) raw.load(i, p.x + (first_row + u) * p.x_stride + 8 * at[i], nullptr);
    }
    raw.values(p.is_bfloat16, v);
  }

  __device__ __forceinline__ void store_squares(double* squares) const {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sum = add_square(sum, v[i][e]);
      if constexpr (!kWhole) {
        if (inside[i]) squares[flat + 32 * i] = sum;
        sum = 0.0;
      }
    }
    if constexpr (kWhole) squares[(flat - threadIdx.x % 32) / kVectors + threadIdx.x % 32] = sum;
  }

  __device__ __forceinline__ void multiply(const uint16_t* weight, bool is_bfloat16) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!inside[i]) continue;
      float w[8];
      to_floats(reinterpret_cast<const uint4*>(weight)[at[i]], is_bfloat16, w);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[i][e] = __fmul_rn(v[i][e], w[e]);
    }
  }

  __device__ __forceinline__ void store(const ColumnStorage& storage) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (inside[i]) store_vector(v[i], storage, flat + 32 * i);
    }
  }
};

// The rows' segments and sums of squares.
template <int kVectors, int kSegment>
__device__ __forceinline__ void transform_rows(const RmsnormHadamardArgs& p,
                                               const ColumnStorage& storage, int64_t first_row,
                                               uint32_t rows, double* squares) {
  const uint32_t count = rows * p.vectors_per_block.divisor, step = blockDim.x * kVectors;
  for (uint32_t tile = threadIdx.x / 32 * 32 * kVectors; tile < count; tile += step) {
    RowTile<kVectors, kSegment> own(p, first_row, tile, count);
    own.store_squares(squares);
    if (p.weight) own.multiply(p.weight, p.weight_is_bfloat16);
    transform_tile<kSegment>(own.v, p.columns, threadIdx.x % 32);
    own.store(storage);
  }
}

// rstd of the group's rows, `count` sums of squares each.
__device__ __forceinline__ void sum_rows(const RmsnormHadamardArgs& p, const double* squares,
                                         uint32_t rows, uint32_t count, float* rstd) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t u = threadIdx.x / 32; u < rows; u += blockDim.x / 32) {
    double sum = 0.0;
    for (uint32_t i = lane; i < count; i += 32) sum += squares[u * count + i];
    sum = warp_sum(sum);
    if (lane == 0) rstd[u] = reciprocal_rms(sum, p.inv_cols, p.eps);
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

template <typename Sums, int kVectors, int kSegment, int kMaxThreads, int kCtasPerSm>
__global__ void __launch_bounds__(kMaxThreads, kCtasPerSm)
    rmsnorm_hadamard_kernel(const RmsnormHadamardArgs p) {
  __shared__ float rstd[kRmsnormHadamardRows];
  double* const squares = reinterpret_cast<double*>(column_smem()) + p.squares_at;
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
    transform_rows<kVectors, kSegment>(p, storage, first, rows, squares);
    __syncthreads();
    prefetch_group(p, first + step);
    sum_rows(p, squares, rows, RowTile<kVectors, kSegment>::sums_of_row(p), rstd);
    __syncthreads();
    uint32_t largest = 0;
    finish_columns<Sums, 1>(p, storage, first, rows, quantizer, compiled_signs, false, largest, 0,
                            NormalizeOutputs{p, rstd});
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

// Vectors of 8 elements of a lane in a tile. Segment 0: any up to 64, with k = 1 up to 256. With
// k = 1, segments of 256 are parts of longer rows, for few of them: one vector keeps the most warps
// busy.
constexpr int rmsnorm_hadamard_vectors(int64_t k, int64_t segment) {
  return segment == 1024 ? 4 : k == 1 && segment == 256 ? 1 : 2;
}

// The most threads a CTA can have, and the CTAs an SM that the registers are bounded for.
struct RmsnormHadamardBounds {
  int threads, ctas;
};
constexpr RmsnormHadamardBounds rmsnorm_hadamard_bounds(int64_t k, int64_t segment) {
  if (k == 1 && segment == 256) return {512, 2};
  return {256, k > 44 ? 2 : 3};
}

// The segments that there are kernels for, of those in kRmsnormHadamardSegments. `inputs`: of sums.
inline constexpr int kRmsnormHadamardSegments[] = {0, 128, 256, 512, 1024};
constexpr bool rmsnorm_hadamard_is_compiled(int k, int inputs, int segment) {
  if (k > 1) return segment <= 256 || (segment == 512 && k <= 28) || k == 12;
  return segment == 1024 || (inputs == 1 ? segment == 0 || segment == 512 : segment == 256);
}

using RmsnormHadamardKernel = void (*)(RmsnormHadamardArgs);

// The kernel for that segment, or nullptr where none is compiled. Defined in
// rmsnorm_hadamard_instance.cuh, instantiated once each in src/inst/rmsnorm_hadamard_*.cu.
template <typename Sums>
RmsnormHadamardKernel rmsnorm_hadamard_instance(int64_t segment);

}  // namespace prefixquant
