// SPDX-License-Identifier: Apache-2.0
//
// Hadamard transforms of few rows: a cluster of CTAs shares one block, every loop is rolled and the
// signs are data. A decode step runs this once between other kernels, so that every line of its
// code comes from the L2 cache or further; the written-out sums of hadamard_sums.cuh are 20 to 60
// KB of it.
//
// Layout: a block is [k q, width], width = min(pow2, 256), q = pow2 / width.
//   1. A warp takes tiles of 256 elements: SwiGLU, butterflies of distance 1 .. 128 in registers.
//      Every 8 columns go to the CTA that owns them, as float32 in its shared memory.
//   2. k > 1: a thread takes a column of four rows j of k (and q of pow2): butterflies of distance
//      256, 512, then the eight sums of the four up to sign, into a table [k/4][8][q][owned].
//   3. k > 1: a thread takes four neighbouring columns of one output: k/4 entries of the table,
//   each
//      found by its pick, added up in the order of the operation.
//      k = 1: lanes are rows, a thread has four neighbouring columns: shuffles.
// Grid: `cluster` CTAs of 512 or 1024 threads a block, up to 16 of them, one block each.
// Smem: x float32 [k q, owned] with padding, the table (twice that), picks int16 [k, k/4], their
//   rows padded to multiples of four.
// Limits: 8 divides width / cluster; rows start at multiples of 16 bytes; k > 1: q <= 4;
//   k = 1: q >= 2.
#pragma once

#include "prefixquant/hadamard_cluster_sums.cuh"
#include "prefixquant/row_reduce.cuh"

namespace prefixquant {

// ---- 3: outputs ----

// Stores four neighbouring results, rounded or as levels; `at` from the start of the block.
__device__ __forceinline__ void store_results(const HadamardClusterArgs& p, const float (&y)[4],
                                              const Quantizer& quantizer, int64_t at) {
  if (p.scaling == RowScale::kNone) {
    const uint2 pairs = p.is_bfloat16 ? make_uint2(pack_pair(y[0], y[1], __nv_bfloat16{}),
                                                   pack_pair(y[2], y[3], __nv_bfloat16{}))
                                      : make_uint2(pack_pair(y[0], y[1], __half{}),
                                                   pack_pair(y[2], y[3], __half{}));
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at) = pairs;
    return;
  }
  uint32_t t[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) t[e] = rounded_bits(y[e], quantizer);
  if ((t[0] | t[1] | t[2] | t[3]) & kNanMark) {
#pragma unroll
    for (int e = 0; e < 4; ++e) t[e] = t[e] & kNanMark ? 0u : t[e];
  }
  *reinterpret_cast<uint32_t*>(static_cast<int8_t*>(p.out) + at) =
      pack_low_bytes(t[0], t[1], t[2], t[3]);
}

// A task of the last phase: four columns of an output. Where they go in the block, and where a task
// may keep its results (in x, which has been read).
struct OutputTask {
  uint32_t row;     // i of k, or of q for k = 1
  uint32_t chunk;   // of 4 columns; k > 1: of the Q parts of a segment one after the other
  uint32_t column;  // in the block, of output row 0
  uint32_t output;  // where its results lie in the block
};

template <int Q>
__device__ __forceinline__ OutputTask output_task(const HadamardClusterArgs& p, uint32_t task,
                                                  uint32_t rank) {
  OutputTask t;
  const uint32_t log2_chunks = p.log2_owned - 2;
  if constexpr (Q > 0) {
    constexpr uint32_t kLog2Q = Q == 4 ? 2 : Q / 2;
    t.row = task >> (log2_chunks + kLog2Q);
    t.chunk = task & ((1u << (log2_chunks + kLog2Q)) - 1);
    const uint32_t part = t.chunk >> log2_chunks, inner = t.chunk & ((1u << log2_chunks) - 1);
    t.column = (part << p.log2_width) + (rank << p.log2_owned) + 4 * inner;
    t.output = t.row * p.pow2 + t.column;
  } else {
    t.row = task & ((1u << p.log2_rows) - 1);
    t.chunk = task >> p.log2_rows;
    t.column = (rank << p.log2_owned) + 4 * t.chunk;
    t.output = (t.row << p.log2_width) + t.column;
  }
  return t;
}

// y + v, or minus it where the bit `minus` is set.
__device__ __forceinline__ void add_signed(float (&y)[4], const uint4& v, uint32_t minus) {
  const float sign = __uint_as_float(minus | 0x3F800000u);
  y[0] = __fmaf_rn(__uint_as_float(v.x), sign, y[0]);
  y[1] = __fmaf_rn(__uint_as_float(v.y), sign, y[1]);
  y[2] = __fmaf_rn(__uint_as_float(v.z), sign, y[2]);
  y[3] = __fmaf_rn(__uint_as_float(v.w), sign, y[3]);
}

// k > 1: the sum of the picked entries.
template <int Q>
__device__ __forceinline__ void add_picked(const HadamardClusterArgs& p, const OutputTask& t,
                                           float (&y)[4]) {
  const uint32_t table_group = 4 * ((8 * Q << p.log2_owned) + p.smem.pad);
  const char* const smem = reinterpret_cast<const char*>(hadamard_cluster_smem());
  const auto* picks =
      reinterpret_cast<const uint2*>(smem + p.smem.picks_at) + t.row * p.pick_vectors.divisor;
  uint32_t entries = smem_address(smem) + p.smem.table_at + 16 * t.chunk;
  y[0] = y[1] = y[2] = y[3] = 0.0f;
#pragma unroll 1
  for (int left = p.k / 4; left > 0; left -= 4, ++picks, entries += 4 * table_group) {
    const uint2 words = *picks;
    const uint32_t four[4] = {words.x, words.x >> 16, words.y, words.y >> 16};
    uint4 v[4];
    // All loads before the first addition; for a group that is not there, the first entry.
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      v[b] = load_shared_16(entries + (b < left ? (four[b] & 0x7FFF) + b * table_group : 0));
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (b < left) add_signed(y, v[b], four[b] << 16 & 0x80000000u);
    }
  }
}

// k = 1: the butterflies between the rows, of which up to 32 are lanes of a warp.
__device__ __forceinline__ void butterflies_between_rows(const HadamardClusterArgs& p,
                                                         const float4& x, float (&y)[4]) {
  y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w;
#pragma unroll 1
  for (int rows = 1; rows < min(1 << p.log2_rows, 32); rows *= 2) {
    butterflies_between_lanes(y, rows, threadIdx.x % 32);
  }
}

// The same for distances of 32 rows and more, through shared memory.
__device__ __forceinline__ void butterflies_between_warps(const HadamardClusterArgs& p,
                                                          uint32_t tasks) {
#pragma unroll 1
  for (int rows = 32; rows < 1 << p.log2_rows; rows *= 2) {
    __syncthreads();
#pragma unroll 1
    for (uint32_t task = threadIdx.x; task < tasks; task += blockDim.x) {
      const uint32_t row = task & ((1u << p.log2_rows) - 1), chunk = task >> p.log2_rows;
      if (row & rows) continue;
      float4* const low =
          reinterpret_cast<float4*>(hadamard_cluster_smem() + row * p.smem.row_stride + 4 * chunk);
      float4* const high = low + rows * (p.smem.row_stride / 4);
      const float4 a = *low, b = *high;
      *low = make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                         __fadd_rn(a.w, b.w));
      *high = make_float4(__fsub_rn(a.x, b.x), __fsub_rn(a.y, b.y), __fsub_rn(a.z, b.z),
                          __fsub_rn(a.w, b.w));
    }
  }
  __syncthreads();
}

template <int Q>
__device__ __forceinline__ float* kept_results(const HadamardClusterArgs& p, const OutputTask& t,
                                               uint32_t task) {
  return hadamard_cluster_smem() + (Q > 0 ? 4 * task : t.row * p.smem.row_stride + 4 * t.chunk);
}

__device__ __forceinline__ uint32_t cluster_max(const HadamardClusterArgs& p, uint32_t largest,
                                                uint32_t rank, uint32_t* maxima,
                                                uint32_t* cluster_maxima) {
  largest = block_max(largest, maxima);
  if (p.log2_cluster == 0) return largest;
  const uint32_t cluster = 1u << p.log2_cluster;
  if (threadIdx.x < cluster) {
    store_to_cluster(address_in_rank(smem_address(cluster_maxima + rank), threadIdx.x), largest);
  }
  cluster_barrier();
#pragma unroll 1
  for (uint32_t r = 0; r < cluster; ++r) largest = max(largest, cluster_maxima[r]);
  return largest;
}

// Outputs that wait for something, in shared memory: the other rows of a long transform, or the
// scale of the row.
template <int Q>
__device__ __forceinline__ void finish_kept(const HadamardClusterArgs& p, uint32_t tasks,
                                            uint32_t rank, Quantizer quantizer, int64_t row,
                                            int64_t block_at) {
  __shared__ uint32_t maxima[32], cluster_maxima[16];
  if constexpr (Q == 0) butterflies_between_warps(p, tasks);
  uint32_t largest = 0;
#pragma unroll 1
  for (bool maximum = p.scaling == RowScale::kDynamic;; maximum = false) {
#pragma unroll 1
    for (uint32_t task = threadIdx.x; task < tasks; task += blockDim.x) {
      const OutputTask t = output_task<Q>(p, task, rank);
      const float4 kept = *reinterpret_cast<const float4*>(kept_results<Q>(p, t, task));
      const float y[4] = {__fmul_rn(kept.x, p.norm), __fmul_rn(kept.y, p.norm),
                          __fmul_rn(kept.z, p.norm), __fmul_rn(kept.w, p.norm)};
      if (maximum) {
#pragma unroll
        for (int e = 0; e < 4; ++e) largest = max(largest, magnitude_bits(y[e]));
      } else {
        store_results(p, y, quantizer, block_at + t.output);
      }
    }
    if (!maximum) break;
    largest = cluster_max(p, largest, rank, maxima, cluster_maxima);
    const float scale = dynamic_scale(__uint_as_float(largest), p.qmax, 1.0f);
    if (threadIdx.x == 0 && rank == 0) p.row_scale[row] = scale;
    quantizer.inv_scale = __frcp_rn(scale);
  }
}

template <int Q>
__device__ __forceinline__ void finish_outputs(const HadamardClusterArgs& p, uint32_t rank,
                                               const Quantizer& quantizer, int64_t row,
                                               int64_t block_at) {
  const uint32_t rows = Q > 0 ? p.k * Q : 1u << p.log2_rows;
  const uint32_t tasks = rows << (p.log2_owned - 2);
  const bool keep = p.scaling == RowScale::kDynamic || (Q == 0 && p.log2_rows > 5);
#pragma unroll 1
  for (uint32_t first = threadIdx.x & ~31u; first < tasks; first += blockDim.x) {
    const uint32_t task = first + threadIdx.x % 32;
    const bool mine = task < tasks;
    const OutputTask t = output_task<Q>(p, mine ? task : first, rank);
    float* const kept = kept_results<Q>(p, t, task);
    float y[4];
    if constexpr (Q > 0) {
      add_picked<Q>(p, t, y);
    } else {
      float4 x = {};  // lanes without a task have no partner with one
      if (mine) x = *reinterpret_cast<const float4*>(kept);
      butterflies_between_rows(p, x, y);
    }
    if (keep) {
      if (mine) *reinterpret_cast<float4*>(kept) = make_float4(y[0], y[1], y[2], y[3]);
    } else if (mine) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[e] = __fmul_rn(y[e], p.norm);
      store_results(p, y, quantizer, block_at + t.output);
    }
  }
  if (keep) finish_kept<Q>(p, tasks, rank, quantizer, row, block_at);
}

// Q: parts of 256 columns of a segment, 0 for k = 1. With 512 threads the SM has two CTAs; launched
// with fewer threads than its bound, the kernel would have one, and 16 clusters of 8 two rounds.
template <int Q, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    hadamard_cluster_kernel(const HadamardClusterArgs p) {
  __shared__ alignas(8) uint64_t received_barrier;
  const bool alone = p.log2_cluster == 0;
  const uint32_t rank = alone ? 0 : cluster_rank(), received = smem_address(&received_barrier);
  grid_dependency_launch();
  if (!alone) {
    prepare_to_receive(received, 4 * p.block_size >> p.log2_cluster);
    cluster_arrive_relaxed();
  }
  if constexpr (Q > 0) make_picks(p, 4 * Q << p.log2_owned);

  const int64_t block = blockIdx.x >> p.log2_cluster;
  const int64_t row = p.blocks_per_row.divide(static_cast<uint32_t>(block));
  const int64_t in_row = (block - row * p.blocks_per_row.divisor) * p.block_size;
  const int64_t x_at = row * p.x_stride + in_row, up_at = row * p.up_stride + in_row;
  const uint32_t tile = rank + (threadIdx.x / 32 << p.log2_cluster);
  const uint32_t vector = 32 * tile + threadIdx.x % 32;

  grid_dependency_wait();
  GateUp raw;
  raw.load(p, x_at, up_at, vector, 8 * vector < static_cast<uint32_t>(p.block_size));
  const float scale = p.scaling == RowScale::kStatic ? *p.scale : 1.0f;
  if (!alone) cluster_wait_acquire();  // nobody sends to a CTA that has not started
  transform_tiles<false>(p, raw, x_at, up_at, tile, received);
  const Quantizer quantizer{__frcp_rn(scale), p.qmin, p.qmax};
  __syncthreads();
  if (!alone) cluster_wait_received(received);
  if constexpr (Q > 0) {
    make_sums<Q>(p);
    __syncthreads();
  }
  finish_outputs<Q>(p, rank, quantizer, row, block * p.block_size);
}

using HadamardClusterKernel = void (*)(HadamardClusterArgs);

// Instantiated in src/inst/hadamard_cluster.cu.
template <int Q, int kThreads>
HadamardClusterKernel hadamard_cluster_instance();

}  // namespace prefixquant
