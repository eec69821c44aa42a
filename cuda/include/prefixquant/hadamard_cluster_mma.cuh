// SPDX-License-Identifier: Apache-2.0
//
// Hadamard transforms with 60 < k < 512 of few rows: a cluster of CTAs shares one block, as in
// hadamard_cluster.cuh, and the k part is a product of signs and integers on the tensor cores
// (hadamard_planes.cuh).
//
// Layout: a block is [k, pow2].
//   1. A warp takes tiles of 256 elements: SwiGLU and all butterflies in registers. Every 8 columns
//      go to the CTA that owns them, as float32 in its shared memory, and the largest magnitude
//      of the warp's tiles to every CTA.
//   2. Integers, cut into planes of bytes: a thread takes four rows j of a column.
//   3. A warp multiplies 16 outputs with 8 columns at a time; its signs are registers since before
//      the wait for the kernel before.
// Grid: `cluster` CTAs of 512 threads a block, one block each.
// Smem: x float32 [k, owned] with padding, the planes, the maxima of all warps.
// Limits: pow2 <= 256, 8 divides pow2 / cluster; k <= 32 kSteps; rows start at multiples of 16
//   bytes.
#pragma once

#include "prefixquant/hadamard_cluster.cuh"
#include "prefixquant/hadamard_planes.cuh"

namespace prefixquant {

inline constexpr int kHadamardClusterMmaThreads = 512;
inline constexpr int kHadamardClusterWarps = kHadamardClusterMmaThreads / 32;

// ---- 1: the largest magnitude ----

// Warps of the cluster that have a tile.
__device__ __forceinline__ uint32_t sending_warps(const HadamardClusterArgs& p) {
  return min(static_cast<uint32_t>(p.block_size + kHadamardTile - 1) / kHadamardTile,
             static_cast<uint32_t>(kHadamardClusterWarps) << p.log2_cluster);
}

__device__ __forceinline__ void send_maximum(const HadamardClusterArgs& p, float largest,
                                             uint32_t tile, uint32_t received) {
  if (tile >= sending_warps(p)) return;
  const uint32_t bits = __reduce_max_sync(0xFFFFFFFFu, magnitude_bits(largest));
  uint32_t* const slot =
      reinterpret_cast<uint32_t*>(hadamard_cluster_smem()) + p.smem.maxima_at / 4 + tile;
  const uint32_t lane = threadIdx.x % 32;
  if (p.log2_cluster == 0) {
    if (lane == 0) *slot = bits;
  } else if (lane >> p.log2_cluster == 0) {
    send_word_to_cluster(address_in_rank(smem_address(slot), lane), bits,
                         address_in_rank(received, lane));
  }
}

__device__ __forceinline__ uint32_t received_maximum(const HadamardClusterArgs& p) {
  const uint32_t* const slots =
      reinterpret_cast<const uint32_t*>(hadamard_cluster_smem()) + p.smem.maxima_at / 4;
  const uint32_t count = sending_warps(p);
  uint32_t largest = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < count; i += 32) largest = max(largest, slots[i]);
  return __reduce_max_sync(0xFFFFFFFFu, largest);
}

// ---- 2: planes ----

__device__ __forceinline__ void make_planes(const HadamardClusterArgs& p,
                                            const IntegerScale& scale) {
  const uint32_t owned = 1u << p.log2_owned, groups = p.k / 4, tasks = groups << p.log2_owned;
  const uint32_t x_group = 4 * owned + p.smem.pad, plane = groups * p.smem.plane_row;
  auto* const planes = reinterpret_cast<uint32_t*>(hadamard_cluster_smem()) + p.smem.planes_at / 4;
#pragma unroll 1
  for (uint32_t task = threadIdx.x; task < tasks; task += kHadamardClusterMmaThreads) {
    const uint32_t group = task >> p.log2_owned, column = task & (owned - 1);
    const float* from = hadamard_cluster_smem() + group * x_group + column;
    uint32_t x[4], high, middle, low;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = offset_integer(from[j * owned], scale);
    split_in_planes(x, high, middle, low);
    uint32_t* const to = planes + group * p.smem.plane_row + column;
    to[0] = high;
    to[plane] = middle;
    to[2 * plane] = low;
  }
}

// ---- 3: the product ----

// A warp's signs: 16 outputs, all inputs.
template <int kSteps>
struct TileSigns {
  uint4 a[kSteps];
  int32_t starts[2];  // -2^6 times the sum of the signs of rows g and g + 8

  __device__ __forceinline__ void load(const HadamardClusterArgs& p, int tile, int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      a[step] = sign_fragment(p.signs, p.k, tile, step, lane);
    }
  }
  __device__ __forceinline__ void find_starts() {
    int sums[2] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      sums[0] = sum_of_bytes(a[step].z, sum_of_bytes(a[step].x, sums[0]));
      sums[1] = sum_of_bytes(a[step].w, sum_of_bytes(a[step].y, sums[1]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) starts[r] = -64 * sum_of_four_lanes(sums[r]);
  }
};

// Columns 8 n .. + 7 of those that this CTA owns: y[r][c] is output row g + 8 r, column 2 t + c.
template <int kSteps>
__device__ __forceinline__ void multiply(const HadamardClusterArgs& p,
                                         const TileSigns<kSteps>& signs, uint32_t n, int lane,
                                         const IntegerScale& scale, float (&y)[2][2]) {
  const uint32_t plane = p.k / 4 * p.smem.plane_row;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(hadamard_cluster_smem()) +
                         p.smem.planes_at / 4 + lane % 4 * p.smem.plane_row + 8 * n + lane / 4;
  // A chain of products for each plane: their latencies overlap.
  int32_t acc[3][4] = {{signs.starts[0], signs.starts[0], signs.starts[1], signs.starts[1]}};
#pragma unroll
  for (int step = 0; step < kSteps; ++step, from += 8 * p.smem.plane_row) {
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      mma_m16n8k32_s8_u8(acc[b], signs.a[step], from[b * plane],
                         from[b * plane + 4 * p.smem.plane_row]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t sum = (static_cast<uint32_t>(acc[0][e]) << 16) +
                         (static_cast<uint32_t>(acc[1][e]) << 8) + acc[2][e];
    y[e / 2][e % 2] = finished_sum(static_cast<int32_t>(sum), scale);
  }
}

// Stores two neighbouring results, rounded or as levels.
__device__ __forceinline__ void store_two(const HadamardClusterArgs& p, const float (&y)[2],
                                          const Quantizer& quantizer, int64_t at) {
  if (p.scaling == RowScale::kNone) {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at) =
        p.is_bfloat16 ? pack_pair(y[0], y[1], __nv_bfloat16{}) : pack_pair(y[0], y[1], __half{});
    return;
  }
  const int8_t low = quantize(y[0], quantizer), high = quantize(y[1], quantizer);
  *reinterpret_cast<uint16_t*>(static_cast<int8_t*>(p.out) + at) =
      static_cast<uint16_t>(static_cast<uint8_t>(low) | static_cast<uint8_t>(high) << 8);
}

// All of this warp's products; the largest magnitude where `maximum`, otherwise they are stored.
template <int kSteps>
__device__ __forceinline__ float finish_products(const HadamardClusterArgs& p,
                                                 const TileSigns<kSteps>& signs, int tile,
                                                 uint32_t part, uint32_t parts, uint32_t rank,
                                                 const IntegerScale& scale,
                                                 const Quantizer& quantizer, int64_t block_at,
                                                 bool maximum) {
  const int lane = threadIdx.x % 32;
  float largest = 0.0f;
#pragma unroll 1
  for (uint32_t n = part; n < 1u << (p.log2_owned - 3); n += parts) {
    float y[2][2];
    multiply(p, signs, n, lane, scale, y);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * tile + 8 * r + lane / 4;
      if (maximum) {
        largest = larger_magnitude(larger_magnitude(largest, y[r][0]), y[r][1]);
      } else if (row < p.k) {
        const uint32_t column = (rank << p.log2_owned) + 8 * n + lane % 4 * 2;
        store_two(p, y[r], quantizer, block_at + row * p.pow2 + column);
      }
    }
  }
  return largest;
}

template <int kSteps>
__global__ void __launch_bounds__(kHadamardClusterMmaThreads, 2)
    hadamard_cluster_mma_kernel(const HadamardClusterArgs p) {
  __shared__ alignas(8) uint64_t received_barrier;
  __shared__ uint32_t maxima[32], cluster_maxima[16];
  const bool alone = p.log2_cluster == 0;
  const uint32_t rank = alone ? 0 : cluster_rank(), received = smem_address(&received_barrier);
  grid_dependency_launch();
  if (!alone) {
    prepare_to_receive(received, (4 * p.block_size >> p.log2_cluster) + 4 * sending_warps(p));
    cluster_arrive_relaxed();
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int output_tiles = (p.k + 15) / 16, parts = kHadamardClusterWarps / output_tiles;
  const int part = warp / output_tiles, output_tile = warp - part * output_tiles;
  TileSigns<kSteps> signs;
  signs.load(p, output_tile, lane);

  const int64_t block = blockIdx.x >> p.log2_cluster;
  const int64_t row = p.blocks_per_row.divide(static_cast<uint32_t>(block));
  const int64_t in_row = (block - row * p.blocks_per_row.divisor) * p.block_size;
  const int64_t x_at = row * p.x_stride + in_row, up_at = row * p.up_stride + in_row;
  const uint32_t tile = rank + (warp << p.log2_cluster), vector = 32 * tile + lane;

  grid_dependency_wait();
  GateUp raw;
  raw.load(p, x_at, up_at, vector, 8 * vector < static_cast<uint32_t>(p.block_size));
  const float input_scale = p.scaling == RowScale::kStatic ? *p.scale : 1.0f;
  signs.find_starts();                 // while the inputs are on their way
  if (!alone) cluster_wait_acquire();  // nobody sends to a CTA that has not started
  send_maximum(p, transform_tiles<true>(p, raw, x_at, up_at, tile, received), tile, received);
  Quantizer quantizer{__frcp_rn(input_scale), p.qmin, p.qmax};
  __syncthreads();
  if (!alone) cluster_wait_received(received);
  const IntegerScale scale = integer_scale(received_maximum(p), p.norm);
  make_planes(p, scale);
  __syncthreads();
  const bool mine = part < parts;
#pragma unroll 1
  for (bool maximum = p.scaling == RowScale::kDynamic;; maximum = false) {
    float largest = 0.0f;
    if (mine) {
      largest = finish_products(p, signs, output_tile, part, parts, rank, scale, quantizer,
                                block * p.block_size, maximum);
    }
    if (!maximum) break;
    const uint32_t bits = cluster_max(p, magnitude_bits(largest), rank, maxima, cluster_maxima);
    const float row_scale = dynamic_scale(__uint_as_float(bits), p.qmax, 1.0f);
    if (threadIdx.x == 0 && rank == 0) p.row_scale[row] = row_scale;
    quantizer.inv_scale = __frcp_rn(row_scale);
  }
}

// Instantiated in src/inst/hadamard_cluster_mma.cu.
template <int kSteps>
HadamardClusterKernel hadamard_cluster_mma_instance();

}  // namespace prefixquant
