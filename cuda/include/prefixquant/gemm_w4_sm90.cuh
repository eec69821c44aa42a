// SPDX-License-Identifier: Apache-2.0
//
// GEMM on Hopper (sm_90a): int8-container activations x packed int4 (or int8) weights.
//
// Computes D[m, n] = sum_k x[m, k] * w[n, k] in int32, then the epilogue of gemm_w4.h.
//   The tensor cores see D^T = W X^T: W is the A operand of wgmma m64nNk32, from registers; X is
//   the B operand, from shared memory.
// Layout
//   x:      int8 [M, K], row-major, row stride a multiple of 16 bytes; read by TMA in boxes of
//           128 bytes of K, 128-byte swizzle; columns beyond K and rows beyond M arrive as zeros.
//   weight: prepacked (layout_w4.h): per group of 64 rows, 128 k are 4096 (int8: 8192) contiguous
//           bytes in the order of the registers, so no swizzle, no shuffle, no bank conflict.
//   out:    [M, N], row-major.
// Grid: persistent; clusters of kCluster CTAs walk over cluster tiles of (kCluster * BLOCK_ROWS)
//   output channels x BLOCK_TOKENS tokens. The CTAs of a cluster own different channels and share
//   the activations: each loads its part of the X tile and multicasts it to all.
//   Tiles [dp_tiles, tiles) are cut evenly over all clusters along K (stream-K); tiles before that
//   are whole. Partial int32 sums meet in the workspace: whoever arrives last at a tile adds the
//   others' parts and runs the epilogue. Integer addition is exact, so the result does not depend
//   on the order of arrival.
//   With kSplitK > 1 a cluster is kSplitK CTAs on one tile, each with its part of K; the parts meet
//   in distributed shared memory, and each CTA finishes its share of the tokens. One tile a
//   cluster.
// Block: 3 warpgroups. Warpgroup 0 is the producer (two threads feed the copy engine); 1 and 2
//   each own kM64 groups of 64 channels and all tokens of the tile.
// Smem: kStages * (BLOCK_TOKENS * 128 + BLOCK_ROWS * 16 * weight_bits) + 2 * staging (8 KB at
// most).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prefixquant/gemm_w4_sm90_consumer.cuh"
#include "prefixquant/gemm_w4_sm90_schedule.cuh"
#include "prefixquant/mbarrier.cuh"
#include "prefixquant/tma.cuh"

namespace prefixquant {

// Producers: two threads keep the ring of stages full, one with activations and one with weights.
// They are apart because weights do not depend on the kernel before: their loads start while that
// kernel still runs (programmatic dependent launch), those of the activations wait for it.
template <typename Traits, typename LoadStage>
__device__ __forceinline__ void gemm_w4_sm90_produce(const GemmW4Sm90Args& args,
                                                     const GemmW4Sm90Smem<Traits>& smem,
                                                     const GemmW4CtaPosition& cta, uint32_t bytes,
                                                     const LoadStage& load_stage) {
  GemmW4Schedule schedule(args, cta.cluster, cta.clusters, cta.k_part, Traits::kSplitK);
  GemmW4Segment segment;
  PipelineCursor<Traits::kStages> cursor;
  while (schedule.next(segment)) {
#pragma unroll 1  // the producer has few registers
    for (int k = segment.k_begin; k < segment.k_end; ++k) {
      // Empty means empty in every CTA that a multicast writes to.
      mbarrier_wait(smem.empty(cursor.stage), cursor.parity ^ 1);
      mbarrier_arrive_expect_tx(smem.full(cursor.stage), bytes);
      load_stage(segment, k, cursor.stage);
      cursor.advance();
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void gemm_w4_sm90_produce_x(const CUtensorMap* x_map,
                                                       const GemmW4Sm90Args& args,
                                                       const GemmW4Sm90Smem<Traits>& smem,
                                                       const GemmW4CtaPosition& cta) {
  constexpr int kPartTokens = Traits::BLOCK_TOKENS / Traits::kCluster;
  const uint32_t part_offset = cta.rank * kPartTokens * Traits::BLOCK_K;
  gemm_w4_sm90_produce<Traits>(
      args, smem, cta, Traits::kXBytes, [&](const GemmW4Segment& segment, int k, int stage) {
        const int token = segment.token_tile * Traits::BLOCK_TOKENS + cta.rank * kPartTokens;
        const uint32_t destination = smem.x(stage) + part_offset;
        if constexpr (Traits::kCluster > 1)
          tma_load_2d_multicast(destination, x_map, k * Traits::BLOCK_K, token, smem.full(stage),
                                (1 << Traits::kCluster) - 1, kL2EvictLast);
        else
          tma_load_2d(destination, x_map, k * Traits::BLOCK_K, token, smem.full(stage),
                      kL2EvictLast);
      });
}

template <typename Traits>
__device__ __forceinline__ void gemm_w4_sm90_produce_w(const GemmW4Sm90Args& args,
                                                       const GemmW4Sm90Smem<Traits>& smem,
                                                       const GemmW4CtaPosition& cta) {
  constexpr int kGroups = Traits::BLOCK_ROWS / 64;
  // Weights that only one token tile needs are read once: keep them from pushing X out of L2.
  const uint64_t policy = args.token_tiles == 1 ? kL2EvictFirst : kL2EvictNormal;
  const int64_t group_bytes = int64_t{args.k_iterations} * Traits::kW64Bytes;
  gemm_w4_sm90_produce<Traits>(
      args, smem, cta, kGroups * Traits::kW64Bytes,
      [&](const GemmW4Segment& segment, int k, int stage) {
        const int first_group = (segment.row_tile * Traits::kCluster + cta.rank) * kGroups;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          // Row groups beyond the matrix repeat the last one; their results are never stored.
          const int group = min(first_group + i, args.row_groups - 1);
          bulk_load(smem.w(stage) + i * Traits::kW64Bytes,
                    args.weight + group * group_bytes + k * Traits::kW64Bytes, Traits::kW64Bytes,
                    smem.full(stage), policy);
        }
      });
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    gemm_w4_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                        const __grid_constant__ GemmW4Sm90Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t smem_raw[];
  const GemmW4Sm90Smem<Traits> smem{(smem_address(smem_raw) + 1023) & ~1023u};

  // Barriers
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&x_map);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(smem.full(stage), 2);  // both producers, plus the bytes they announce
      mbarrier_init(smem.empty(stage), Traits::kStageReaders);
    }
    fence_mbarrier_init();
  }
  if constexpr (Traits::kCluster > 1)
    cluster_sync_execution();
  else
    __syncthreads();
  launch_dependent_grids();

  constexpr int kClusterSize = Traits::kCluster * Traits::kSplitK;
  const int cta_rank = kClusterSize > 1 ? static_cast<int>(cluster_cta_rank()) : 0;
  const GemmW4CtaPosition cta{
      static_cast<int>(blockIdx.x) / kClusterSize, static_cast<int>(gridDim.x) / kClusterSize,
      Traits::kCluster > 1 ? cta_rank : 0, Traits::kSplitK > 1 ? cta_rank : 0};
  // The producer gives most of its registers to the consumers.
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    if (threadIdx.x == 0) {
      gemm_w4_sm90_produce_w<Traits>(args, smem, cta);
    } else if (threadIdx.x == 32) {
      wait_for_previous_grids();
      gemm_w4_sm90_produce_x<Traits>(&x_map, args, smem, cta);
    }
    __syncwarp();
    if constexpr (Traits::kSplitK > 1) cluster_sync();  // the one inside reduce_split
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    wait_for_previous_grids();  // before any access to out, residual and workspace
    const int thread = threadIdx.x % 128;
    GemmW4Sm90Consumer<Traits> consumer(args, smem, threadIdx.x / 128 - 1, thread, cta);
    GemmW4Schedule schedule(args, cta.cluster, cta.clusters, cta.k_part, Traits::kSplitK);
    GemmW4Segment segment;
    PipelineCursor<Traits::kStages> cursor;
    while (schedule.next(segment)) {
      consumer.load_row_constants(segment);
      consumer.multiply_segment(segment, cursor);
      if constexpr (Traits::kSplitK > 1) {
        consumer.reduce_split();
        consumer.store(segment);
        break;  // one tile a cluster
      } else {
        if (segment.stream_k_tile < 0 || consumer.reduce_partials(segment)) consumer.store(segment);
      }
    }
  }
  // A CTA's shared memory must outlive its peers' arrivals, multicasts and reads.
  if constexpr (kClusterSize > 1) {
    __syncwarp();
    cluster_sync_execution();
  }
#else
  __trap();  // wgmma and setmaxnreg exist on sm_90a only
#endif
}

}  // namespace prefixquant
