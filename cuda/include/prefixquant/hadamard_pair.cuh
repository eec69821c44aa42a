// SPDX-License-Identifier: Apache-2.0
//
// The kernel of hadamard.cuh for blocks of which fewer CTAs fit an SM than its registers allow: two
// CTAs, a cluster, share a block.
//
// Layout: a block is [inputs, segment] as there. Of the inputs, a CTA transforms one half; of the
//   columns, CTA 0 owns the lower half of every segment and CTA 1 the upper one. The butterflies of
//   the largest distance are what separates them: sums are columns of CTA 0, differences of CTA 1,
//   which st.async carries there. From then on every CTA goes on as if the block were its columns.
// Grid: persistent clusters of two CTAs of 256 threads that walk over the blocks.
// Smem: 4 bytes an element of the CTA's half, arranged as in hadamard.cuh.
// Barriers: `received` counts the bytes that the other CTA sends for a block, `read` says that the
//   other CTA has read its columns of the block before and can be sent the next ones.
// Limits: sm_90; segments of 512 or 1024 elements, one block at a time, no dynamic scale.
#pragma once

#include "prefixquant/hadamard.cuh"
#include "prefixquant/hadamard_exchange.cuh"

namespace prefixquant {

// What a CTA knows of its pair; addresses are those of shared memory.
struct HadamardPair {
  uint32_t rank;
  uint32_t received, read;  // this CTA's barriers
  uint32_t other;           // the other CTA's columns
  uint32_t other_received;
};

#if __CUDA_ARCH__ >= 900

// Vector `flat` of the other CTA's columns.
__device__ __forceinline__ void send_vector(const float (&v)[8], const ColumnStorage& storage,
                                            const HadamardPair& pair, uint32_t flat) {
  send_to_cluster(pair.other + 16 * storage.half(flat, 0), make_float4(v[0], v[1], v[2], v[3]),
                  pair.other_received);
  send_to_cluster(pair.other + 16 * storage.half(flat, 1), make_float4(v[4], v[5], v[6], v[7]),
                  pair.other_received);
}

// This CTA's inputs of a block; kVectors: a lane's vectors of half a segment.
template <bool kSwiglu, int kVectors>
__device__ __forceinline__ void transform_inputs(const HadamardArgs& p,
                                                 const ColumnStorage& storage,
                                                 const HadamardPair& pair,
                                                 const longlong2& block_at, uint32_t inputs,
                                                 uint32_t parity) {
  const int lane = threadIdx.x % 32;
  const float sign = pair.rank == 0 ? 1.0f : -1.0f;
  const uint32_t first = pair.rank * inputs;
  for (uint32_t input = first + threadIdx.x / 32; input < first + inputs;
       input += blockDim.x / 32) {
    const uint16_t* x = p.x + block_at.x + input * p.segment + 8 * lane;
    const uint16_t* up = p.up + block_at.y + input * p.segment + 8 * lane;
    RawTile<kSwiglu, kVectors> low_raw, high_raw;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) low_raw.load(i, x + 256 * i, up + 256 * i);
#pragma unroll
    for (int i = kVectors; i < 2 * kVectors; ++i) {
      high_raw.load(i - kVectors, x + 256 * i, up + 256 * i);
    }
    float low[kVectors][8], high[kVectors][8];
    low_raw.values(p.is_bfloat16, low);
    high_raw.values(p.is_bfloat16, high);
    transform_tile<256 * kVectors>(low, p.columns, lane);
    transform_tile<256 * kVectors>(high, p.columns, lane);
    mbarrier_wait(pair.read, parity ^ 1);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float mine[8], others[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {  // fma(b, -1, a) is a - b
        mine[e] = __fmaf_rn(high[i][e], sign, low[i][e]);
        others[e] = __fmaf_rn(high[i][e], -sign, low[i][e]);
      }
      const uint32_t flat = input * (32 * kVectors) + 32 * i + lane;
      send_vector(others, storage, pair, flat);
      store_vector(mine, storage, flat);
    }
  }
}

template <bool kSwiglu>
__device__ __forceinline__ void transform_inputs(const HadamardArgs& p,
                                                 const ColumnStorage& storage,
                                                 const HadamardPair& pair,
                                                 const longlong2& block_at, uint32_t inputs,
                                                 uint32_t parity) {
  if (p.segment == 1024) {
    transform_inputs<kSwiglu, 2>(p, storage, pair, block_at, inputs, parity);
  } else {
    transform_inputs<kSwiglu, 1>(p, storage, pair, block_at, inputs, parity);
  }
}

// Asks for this CTA's inputs of a block in the L2 cache.
__device__ __forceinline__ void prefetch_inputs(const HadamardArgs& p, const HadamardPair& pair,
                                                const longlong2& block_at) {
  const uint32_t half = p.block_size / 2, first = pair.rank * half;
  prefetch_l2(p.x + block_at.x + first, 2 * half);
  if (p.up) prefetch_l2(p.up + block_at.y + first, 2 * half);
}

// Both CTAs' barriers are ready when it returns.
__device__ __forceinline__ HadamardPair make_pair(uint64_t (&barriers)[2]) {
  HadamardPair pair;
  pair.rank = cluster_cta_rank();
  pair.received = smem_address(&barriers[0]);
  pair.read = smem_address(&barriers[1]);
  pair.other = address_in_rank(smem_address(column_smem()), pair.rank ^ 1);
  pair.other_received = address_in_rank(pair.received, pair.rank ^ 1);
  if (threadIdx.x == 0) {
    mbarrier_init(pair.received, 1);
    mbarrier_init(pair.read, 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  cluster_sync_execution();
  return pair;
}

#endif

template <typename Sums, int kCtasPerSm>
__global__ void __launch_bounds__(kHadamardThreads, kCtasPerSm)
    hadamard_pair_kernel(const HadamardArgs p) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(8) uint64_t barriers[2];
  constexpr uint32_t kInputs = Sums::kInputs / 2;  // of a CTA
  const ColumnStorage storage(p.block_size / 2, p.log2_columns);
  grid_dependency_launch();
  const HadamardPair pair = make_pair(barriers);
  const bool compiled_signs = signs_match<Sums::K>(p.signs);
  if (threadIdx.x == 0) prefetch_inputs(p, pair, block_offset(p, blockIdx.x / 2));
  grid_dependency_wait();

  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if (p.scaling == RowScale::kStatic) quantizer.inv_scale = __fdiv_rn(1.0f, *p.scale);
  const uint32_t blocks = static_cast<uint32_t>(p.blocks), step = gridDim.x / 2;
  uint32_t parity = 0, largest = 0;
  for (uint32_t block = blockIdx.x / 2; block < blocks; block += step, parity ^= 1) {
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(pair.received, kInputs * p.columns * 4);
    const longlong2 block_at = block_offset(p, block);
    if (p.up) {
      transform_inputs<true>(p, storage, pair, block_at, kInputs, parity);
    } else {
      transform_inputs<false>(p, storage, pair, block_at, kInputs, parity);
    }
    __syncthreads();
    const bool more = block + step < blocks;
    if (threadIdx.x == 0 && more) {
      prefetch_inputs(p, pair, block_offset(p, block + step));
    }
    mbarrier_wait(pair.received, parity);
    finish_columns<Sums, 2>(p, storage, block, 1, quantizer, compiled_signs, false, largest,
                            pair.rank);
    __syncthreads();  // all of this CTA's columns have been read
    // Not after the last block: nobody waits for it, and the other CTA may be gone when it lands.
    // All else that is sent is waited for, so that a CTA can leave when it is done.
    if (threadIdx.x == 0 && more) mbarrier_arrive_cluster(pair.read, pair.rank ^ 1);
  }
#endif
}

// Instantiated beside the kernels of hadamard.cuh.
template <typename Sums, int kCtasPerSm>
HadamardSumsKernel hadamard_pair_instance();

}  // namespace prefixquant
