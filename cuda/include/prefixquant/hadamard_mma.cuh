// SPDX-License-Identifier: Apache-2.0
//
// Hadamard transforms with 60 < k < 512 of many rows: the k part is a product of signs and integers
// on the tensor cores (hadamard_planes.cuh).
//
// Layout: a block is [k, pow2], pow2 = 64 kParts kTasks, and a warp has 16 of its outputs:
//   1. A thread takes 4 neighbouring rows j x 8 columns (kTasks times), 16-byte loads: SwiGLU and
//      the butterflies, three stages in the thread, the others by shuffles. They stay in registers.
//   2. The block's largest magnitude, a barrier.
//   3. Integers, cut into planes of bytes: four j are a word. A barrier.
//   4. A warp multiplies its tile of 16 outputs with 64 columns at a time (kParts warps share the
//      columns of a tile) and writes the results, 8 neighbouring columns a thread.
// The first barrier of the next block is also the one after which its planes may be written.
// Grid: persistent CTAs of kTiles kParts warps, one block at a time; the next one is asked for in
//   the L2 cache.
// Smem: the planes, 3 bytes an element and 96 a row of four j (so that the 16-byte stores of eight
//   neighbours and the loads of four rows meet different banks), the signs in the order of the
//   fragments, and where a row of outputs starts.
// Limits: k <= 16 kTiles; rows start at multiples of 16 bytes.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/hadamard_planes.cuh"
#include "prefixquant/hadamard_row_args.h"
#include "prefixquant/hadamard_tile.cuh"
#include "prefixquant/quantizer.cuh"
#include "prefixquant/row_reduce.cuh"

namespace prefixquant {

struct HadamardMmaArgs : HadamardRowArgs {
  int k;
  int64_t blocks;                 // of all rows
  uint32_t qmin_pair, qmax_pair;  // level_pair
};

template <int kTiles_, int kParts_, int kTasks_>
struct HadamardMmaShape {
  static constexpr int kTiles = kTiles_, kParts = kParts_, kTasks = kTasks_;
  static constexpr int kSteps = (kTiles + 1) / 2;  // of 32 inputs
  static constexpr int kPow2 = 64 * kParts * kTasks;
  static constexpr int kThreads = 32 * kTiles * kParts;
  static constexpr int kChunks = kPow2 / 8;  // of 8 columns
  static constexpr int kRowBytes = 4 * hadamard_mma_row_words(kPow2);
  static constexpr int kCtasPerSm = hadamard_mma_ctas_per_sm(kThreads, kTasks);
};

// By name, so that the accesses stay shared-memory accesses.
__device__ __forceinline__ char* hadamard_mma_smem() {
  extern __shared__ uint4 mma_smem[];
  return reinterpret_cast<char*>(mma_smem);
}

__device__ __forceinline__ uint4* sign_fragments(const HadamardMmaArgs& p, int row_bytes) {
  return reinterpret_cast<uint4*>(hadamard_mma_smem() + 3 * (p.k / 4) * row_bytes);
}

// Signs and row starts into shared memory, once a CTA.
template <typename Shape>
__device__ __forceinline__ void keep_signs(const HadamardMmaArgs& p, int32_t* row_starts) {
  uint4* const fragments = sign_fragments(p, Shape::kRowBytes);
  const int lane = threadIdx.x % 32;
  for (int tile = threadIdx.x / 32; tile < Shape::kTiles; tile += Shape::kThreads / 32) {
    int sums[2] = {};
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      const uint4 a = sign_fragment(p.signs, p.k, tile, step, lane);
      fragments[(tile * Shape::kSteps + step) * 32 + lane] = a;
      sums[0] = sum_of_bytes(a.z, sum_of_bytes(a.x, sums[0]));
      sums[1] = sum_of_bytes(a.w, sum_of_bytes(a.y, sums[1]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t start = -64 * sum_of_four_lanes(sums[r]);
      if (lane % 4 == 0) row_starts[16 * tile + 8 * r + lane / 4] = start;
    }
  }
}

// Where a block begins.
struct BlockOrigin {
  int64_t row;
  int64_t x_at, up_at;

  __device__ __forceinline__ BlockOrigin(const HadamardMmaArgs& p, uint32_t block) {
    const uint32_t r = p.blocks_per_row.divide(block);
    const int64_t column =
        static_cast<int64_t>(block - r * p.blocks_per_row.divisor) * p.block_size;
    row = r;
    x_at = row * p.x_stride + column;
    up_at = row * p.up_stride + column;
  }
};

// ---- 1: butterflies ----

// Rows 4 group .. + 3 and columns 8 chunk .. + 7 of a block [rows, kPow2].
template <bool kSwiglu, int kPow2>
__device__ __forceinline__ void load_group(const HadamardMmaArgs& p, const BlockOrigin& origin,
                                           int group, int chunk, float (&v)[4][8]) {
  const uint32_t at = 4 * group * kPow2 + 8 * chunk;
  const uint16_t* const x = p.x + origin.x_at + at;
  const uint16_t* const up = p.up + origin.up_at + at;
  RawTile<kSwiglu, 4> raw;
#pragma unroll
  for (int j = 0; j < 4; ++j) raw.load(j, x + j * kPow2, up + j * kPow2);
  raw.values(p.is_bfloat16, v);
}

// A task beyond the block repeats one in it: all lanes shuffle, and the maximum does not notice.
template <bool kSwiglu, typename Shape>
__device__ __forceinline__ void load_task(const HadamardMmaArgs& p, const BlockOrigin& origin,
                                          int task, float (&v)[4][8]) {
  load_group<kSwiglu, Shape::kPow2>(p, origin, min(task / Shape::kChunks, p.k / 4 - 1),
                                    task % Shape::kChunks, v);
}

// A warp has all columns of its rows, and all its lanes shuffle.
template <int kPow2>
__device__ __forceinline__ void transform_columns(float (&v)[4][8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    butterflies_in_vector<1>(v[j]);
    butterflies_in_vector<2>(v[j]);
    butterflies_in_vector<4>(v[j]);
  }
  butterflies_between_lanes<1>(v, lane);
  butterflies_between_lanes<2>(v, lane);
  butterflies_between_lanes<4>(v, lane);
  if constexpr (kPow2 >= 128) butterflies_between_lanes<8>(v, lane);
  if constexpr (kPow2 >= 256) butterflies_between_lanes<16>(v, lane);
}

// ---- 3: planes ----

// Unit of four columns `half` of a chunk: swapped in every other four chunks, so that the first
// halves of eight chunks lie in different banks.
template <typename Shape>
__device__ __forceinline__ void store_planes(const HadamardMmaArgs& p, const IntegerScale& scale,
                                             int task, const float (&v)[4][8]) {
  const int group = task / Shape::kChunks, chunk = task % Shape::kChunks;
  if (4 * group >= p.k) return;
  char* const row = hadamard_mma_smem() + group * Shape::kRowBytes;
  const int plane = p.k / 4 * Shape::kRowBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t high[4], middle[4], low[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = offset_integer(v[j][4 * half + c], scale);
      split_in_planes(x, high[c], middle[c], low[c]);
    }
    uint4* const to = reinterpret_cast<uint4*>(row) + (2 * chunk + (half ^ (chunk >> 2 & 1)));
    *to = make_uint4(high[0], high[1], high[2], high[3]);
    to[plane / 16] = make_uint4(middle[0], middle[1], middle[2], middle[3]);
    to[plane / 8] = make_uint4(low[0], low[1], low[2], low[3]);
  }
}

// ---- 4: the product ----

// acc[n]: columns 4 c + n % 4 of the 32 columns n / 4, c = 0 .. 7 the columns of the fragment.
template <typename Shape>
__device__ __forceinline__ void multiply(const HadamardMmaArgs& p, const uint4 (&a)[Shape::kSteps],
                                         const int32_t (&starts)[2], int part,
                                         int32_t (&acc)[8][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int plane = p.k / 4 * Shape::kRowBytes;
  const char* first = hadamard_mma_smem() + 256 * part + t * Shape::kRowBytes + 16 * g;
  const char* second = hadamard_mma_smem() + 256 * part + t * Shape::kRowBytes + 16 * (g ^ 1) + 128;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    acc[n][0] = acc[n][1] = starts[0];
    acc[n][2] = acc[n][3] = starts[1];
  }
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    if (b > 0) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][e] = static_cast<int32_t>(acc[n][e] * 256u);
      }
      first += plane, second += plane;
    }
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      const int at = 8 * step * Shape::kRowBytes;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const char* from = (q == 0 ? first : second) + at;
        const uint4 b0 = *reinterpret_cast<const uint4*>(from);
        const uint4 b1 = *reinterpret_cast<const uint4*>(from + 4 * Shape::kRowBytes);
        mma_m16n8k32_s8_u8(acc[4 * q], a[step], b0.x, b1.x);
        mma_m16n8k32_s8_u8(acc[4 * q + 1], a[step], b0.y, b1.y);
        mma_m16n8k32_s8_u8(acc[4 * q + 2], a[step], b0.z, b1.z);
        mma_m16n8k32_s8_u8(acc[4 * q + 3], a[step], b0.w, b1.w);
      }
    }
  }
}

// Eight neighbouring results, rounded or as levels. kNumbers: levels of scale_for_levels and
// number_scale; `bounded`: as quantize8_bounded wants them.
template <bool kNumbers>
__device__ __forceinline__ void store_eight(const HadamardMmaArgs& p, const float (&y)[8],
                                            const Quantizer& quantizer, int64_t at,
                                            bool bounded = false) {
  if (p.scaling != RowScale::kNone) {
    *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.out) + at) =
        kNumbers && bounded ? quantize8_bounded(y, quantizer.inv_scale, p.qmin_pair, p.qmax_pair)
                            : quantize8<kNumbers>(y, quantizer);
    return;
  }
  uint4 words;
  if (p.is_bfloat16) {
    RawVector<__nv_bfloat16> raw;
    from_floats(y, raw);
    words = raw.words[0];
  } else {
    RawVector<__half> raw;
    from_floats(y, raw);
    words = raw.words[0];
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + at) = words;
}

// All columns of this warp's tile; `largest` collects the magnitudes where `maximum`, otherwise the
// results are stored.
template <typename Shape>
__device__ __forceinline__ void finish_tile(const HadamardMmaArgs& p, const IntegerScale& scale,
                                            const int32_t* row_starts, const Quantizer& quantizer,
                                            int64_t block_at, bool maximum, float& largest) {
  const int warp = threadIdx.x / 32, tile = warp / Shape::kParts;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint4* const fragments =
      sign_fragments(p, Shape::kRowBytes) + tile * Shape::kSteps * 32 + lane;
  uint4 a[Shape::kSteps];
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) a[step] = fragments[step * 32];
  const int32_t starts[2] = {row_starts[16 * tile + g], row_starts[16 * tile + g + 8]};
#pragma unroll 1
  for (int part = warp % Shape::kParts; part < Shape::kPow2 / 64; part += Shape::kParts) {
    int32_t acc[8][4];
    multiply<Shape>(p, a, starts, part, acc);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * tile + 8 * r + g;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          y[e] = finished_sum(acc[4 * q + e % 4][2 * r + e / 4], scale);
        }
        if (maximum) {
#pragma unroll
          for (int e = 0; e < 8; ++e) largest = larger_magnitude(largest, y[e]);
        } else if (row < p.k) {
          store_eight<false>(p, y, quantizer,
                             block_at + row * Shape::kPow2 + 64 * part + 32 * q + 8 * t);
        }
      }
    }
  }
}

// Asks for the inputs of a block in the L2 cache.
__device__ __forceinline__ void prefetch_block(const HadamardMmaArgs& p, uint32_t block) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x != 0 || block >= static_cast<uint32_t>(p.blocks)) return;
  const BlockOrigin origin(p, block);
  prefetch_l2(p.x + origin.x_at, 2 * p.block_size);
  if (p.up) prefetch_l2(p.up + origin.up_at, 2 * p.block_size);
#endif
}

// Writes a block by `finish`; with dynamic scales the product is made once for the largest
// magnitude, which `finish` adds to, and once more for the levels. kAtomic: as block_max.
template <bool kAtomic = false, typename Finish>
__device__ __forceinline__ void finish_block(const HadamardMmaArgs& p, int64_t row,
                                             Quantizer& quantizer, uint32_t* output_maxima,
                                             const Finish& finish) {
  float largest = 0.0f;
#pragma unroll 1
  for (bool maximum = p.scaling == RowScale::kDynamic;; maximum = false) {
    finish(maximum, largest);
    if (!maximum) break;
    const uint32_t bits = block_max<kAtomic>(magnitude_bits(largest), output_maxima);
    const float row_scale = dynamic_scale(__uint_as_float(bits), p.qmax, 1.0f);
    if (threadIdx.x == 0) p.row_scale[row] = row_scale;
    quantizer.inv_scale = number_scale(__frcp_rn(row_scale));
  }
}

template <typename Shape, bool kSwiglu>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
    hadamard_mma_kernel(const HadamardMmaArgs p) {
  __shared__ uint32_t maxima[32], output_maxima[32];
  __shared__ int32_t row_starts[16 * Shape::kTiles];
  grid_dependency_launch();
  keep_signs<Shape>(p, row_starts);
  grid_dependency_wait();
#pragma unroll 1
  for (uint32_t block = blockIdx.x; block < static_cast<uint32_t>(p.blocks); block += gridDim.x) {
    const BlockOrigin origin(p, block);
    float v[Shape::kTasks][4][8];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kTasks; ++i) {
      const int task = threadIdx.x + i * Shape::kThreads;
      load_task<kSwiglu, Shape>(p, origin, task, v[i]);
      transform_columns<Shape::kPow2>(v[i]);
#pragma unroll
      for (int e = 0; e < 32; ++e) largest = larger_magnitude(largest, v[i][e / 8][e % 8]);
    }
    const IntegerScale scale = integer_scale(block_max(magnitude_bits(largest), maxima), p.norm);
#pragma unroll
    for (int i = 0; i < Shape::kTasks; ++i) {
      store_planes<Shape>(p, scale, threadIdx.x + i * Shape::kThreads, v[i]);
    }
    Quantizer quantizer{1.0f, p.qmin, p.qmax};
    if (p.scaling == RowScale::kStatic) quantizer.inv_scale = __frcp_rn(*p.scale);
    __syncthreads();
    prefetch_block(p, block + gridDim.x);
    const int64_t block_at = static_cast<int64_t>(block) * p.block_size;
    finish_block(p, origin.row, quantizer, output_maxima, [&](bool maximum, float& seen) {
      finish_tile<Shape>(p, scale, row_starts, quantizer, block_at, maximum, seen);
    });
  }
}

using HadamardMmaKernel = void (*)(HadamardMmaArgs);

// Instantiated in src/inst/hadamard_mma_*.cu.
template <int kTiles, int kParts, int kTasks>
HadamardMmaKernel hadamard_mma_instance(bool swiglu);
// The kernels of hadamard_wgmma.cuh, in src/inst/hadamard_sm90.cu.
template <int kSteps, int kPow2>
HadamardMmaKernel hadamard_wgmma_instance(bool swiglu);
// The kernel of kHadamardPairBlocks[kIndex], in src/inst/hadamard_pair_sm90.cu.
template <int kIndex>
HadamardMmaKernel hadamard_pair_wgmma_instance(bool swiglu);

}  // namespace prefixquant
