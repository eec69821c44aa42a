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
//   in distributed shared memory, and each CTA finishes its share of the tokens. One tile a cluster.
// Block: 3 warpgroups. Warpgroup 0 is the producer (two threads feed the copy engine); 1 and 2
//   each own kM64 groups of 64 channels and all tokens of the tile.
// Smem: kStages * (BLOCK_TOKENS * 128 + BLOCK_ROWS * 16 * weight_bits) + 2 * staging (8 KB at most).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prefixquant/epilogue.cuh"
#include "prefixquant/int4.cuh"
#include "prefixquant/layout_w4.h"
#include "prefixquant/mbarrier.cuh"
#include "prefixquant/tma.cuh"
#include "prefixquant/wgmma.cuh"

namespace prefixquant {

inline constexpr int kSm90SmemLimit = 232448;  // bytes a block can have on sm_90 (227 KB)

template <int kWeightBits_,  // 4 or 8
          int kM64_,         // groups of 64 channels a consumer warpgroup owns
          int BLOCK_TOKENS_, // N of the wgmma
          int kCluster_,     // CTAs of a cluster that share the activations, on different channels
          int kSplitK_ = 1>  // CTAs of a cluster that share one tile, on different parts of K
struct GemmW4Sm90Traits {
  static constexpr int kWeightBits = kWeightBits_;
  static constexpr int kM64 = kM64_;
  static constexpr int BLOCK_TOKENS = BLOCK_TOKENS_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kSplitK = kSplitK_;
  static constexpr int BLOCK_K = 128;  // one row of a 128-byte swizzled tile
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int BLOCK_ROWS = 64 * kM64 * kConsumers;
  static constexpr int kXBytes = BLOCK_TOKENS * BLOCK_K;
  static constexpr int kW64Bytes = 64 * BLOCK_K * kWeightBits / 8;  // one group of 64 rows
  static constexpr int kStageBytes = kXBytes + BLOCK_ROWS / 64 * kW64Bytes;
  // After the parts of K have met, each CTA of a split finishes its share of the tokens. The
  // epilogue transposes 64 channels x kStagingTokens at a time, 128 bytes a token.
  static constexpr int kFinalTokens = BLOCK_TOKENS / kSplitK;
  static constexpr int kStagingTokens =
      kFinalTokens % 64 == 0 ? 64 : kFinalTokens % 32 == 0 ? 32 : 16;
  static constexpr int kStagingBytes = kStagingTokens * 128;
  static constexpr int kFixedBytes = 1024 /* alignment */ + kConsumers * kStagingBytes + 1024;
  static constexpr int kFit = (kSm90SmemLimit - kFixedBytes) / kStageBytes;
  // More than 12 stages bring nothing; 6 of 128 x 64 are 10-20 % slower than 12 (H100, M = 64),
  // although two CTAs fit an SM then and the next kernel could start to load early.
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static constexpr int kSmemBytes = kFixedBytes + kStages * kStageBytes;
  // 65536 registers = 384 threads x 168, which setmaxnreg deals out again.
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kAccumulators = BLOCK_TOKENS / 2;  // per thread and group of 64 channels

  static_assert(kWeightBits == 4 || kWeightBits == 8, "weights are int4 or int8");
  static_assert(BLOCK_TOKENS % 16 == 0 && BLOCK_TOKENS <= 256, "N of wgmma");
  static_assert(kM64 * BLOCK_TOKENS <= 256, "128 accumulator registers a thread at most");
  static_assert(BLOCK_TOKENS / kCluster % 8 == 0, "a multicast part is whole swizzle atoms");
  static_assert(kSplitK == 1 || kCluster == 1, "a cluster shares activations or a tile");
  static_assert(kFinalTokens % 16 == 0, "stmatrix stores 16 tokens at a time");
  static_assert(BLOCK_ROWS * BLOCK_TOKENS * 4 <= kStages * kStageBytes || kSplitK == 1,
                "the parts of a split meet in the memory of the stages");
  static_assert(kStages >= 3, "load, multiply and release need a stage each");
};

// Kernel arguments; see GemmW4Params for the pointers.
struct GemmW4Sm90Args {
  const uint8_t* weight;
  EpilogueArgs epilogue;
  int k_iterations;       // padded K / 128
  int row_groups;         // groups of 64 rows in the prepacked weight
  int row_tiles;          // cluster tiles along the channels
  int token_tiles;
  int token_tile_group;   // token tiles visited before moving on along the channels (L2 reuse)
  int dp_tiles;           // cluster tiles computed whole
  int stream_k_tiles;     // cluster tiles cut along K
  int* counters;          // [stream_k_tiles, kCluster, 2], zero before and after each launch
  int4* partials;         // [clusters, 2, kCluster, 2] slots of one warpgroup's accumulators
};

// One piece of work of a cluster: iterations [k_begin, k_end) of one cluster tile.
struct GemmW4Segment {
  int row_tile;
  int token_tile;
  int k_begin;
  int k_end;
  int stream_k_tile;  // index among the stream-K tiles, -1 for whole tiles
};

// Walks over the segments of one cluster. Producer and consumers each run their own copy and see
// the same sequence: first the stream-K range (so that the sum of the parts is ready long before
// the end where there are whole tiles too), then whole tiles.
class GemmW4Schedule {
 public:
  __device__ __forceinline__ GemmW4Schedule(const GemmW4Sm90Args& args, int cluster, int clusters,
                                            int k_part, int k_parts)
      : args_(args),
        clusters_(clusters),
        next_whole_tile_(cluster),
        k_begin_(args.k_iterations * k_part / k_parts),
        k_end_(args.k_iterations * (k_part + 1) / k_parts) {
    cursor_ = stream_k_begin(args, cluster, clusters);
    stream_k_end_ = stream_k_begin(args, cluster + 1, clusters);
  }

  // First stream-K iteration of a cluster, counted over all stream-K tiles.
  static __device__ __forceinline__ int stream_k_begin(const GemmW4Sm90Args& args, int cluster,
                                                       int clusters) {
    const int64_t iterations = int64_t{args.stream_k_tiles} * args.k_iterations;
    return static_cast<int>(iterations * cluster / clusters);
  }

  __device__ __forceinline__ bool next(GemmW4Segment& segment) {
    int tile;
    if (cursor_ < stream_k_end_) {
      segment.stream_k_tile = cursor_ / args_.k_iterations;
      segment.k_begin = cursor_ - segment.stream_k_tile * args_.k_iterations;
      segment.k_end = min(args_.k_iterations, segment.k_begin + stream_k_end_ - cursor_);
      cursor_ += segment.k_end - segment.k_begin;
      tile = args_.dp_tiles + segment.stream_k_tile;
    } else if (next_whole_tile_ < args_.dp_tiles) {
      segment.stream_k_tile = -1;
      segment.k_begin = k_begin_;
      segment.k_end = k_end_;
      tile = next_whole_tile_;
      next_whole_tile_ += clusters_;
    } else {
      return false;
    }
    // Token tiles fastest, within groups that keep their activations in L2.
    const int tiles_per_group = args_.token_tile_group * args_.row_tiles;
    const int group = tile / tiles_per_group;
    const int first_token_tile = group * args_.token_tile_group;
    const int group_size = min(args_.token_tile_group, args_.token_tiles - first_token_tile);
    const int in_group = tile - group * tiles_per_group;
    segment.row_tile = in_group / group_size;
    segment.token_tile = first_token_tile + in_group % group_size;
    return true;
  }

 private:
  const GemmW4Sm90Args& args_;
  int clusters_;
  int next_whole_tile_;
  int k_begin_;  // of whole tiles: all of K, or this CTA's part
  int k_end_;
  int cursor_;
  int stream_k_end_;
};

// Which CTA this is. `rank` counts along the channels of a cluster tile, `k_part` along K.
struct GemmW4CtaPosition {
  int cluster;
  int clusters;
  int rank;
  int k_part;
};

// Position in the ring of stages, with the parity of the phase its barriers are in.
template <int kStages>
struct PipelineCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Shared-memory addresses of one CTA.
template <typename Traits>
struct GemmW4Sm90Smem {
  uint32_t base;  // 1024-byte aligned: the swizzle pattern is a function of the address

  static constexpr uint32_t kStagingOffset = Traits::kStages * Traits::kStageBytes;
  static constexpr uint32_t kBarrierOffset =
      kStagingOffset + Traits::kConsumers * Traits::kStagingBytes;

  __device__ __forceinline__ uint32_t x(int stage) const {
    return base + stage * Traits::kStageBytes;
  }
  __device__ __forceinline__ uint32_t w(int stage) const { return x(stage) + Traits::kXBytes; }
  __device__ __forceinline__ uint32_t staging(int consumer) const {
    return base + kStagingOffset + consumer * Traits::kStagingBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + kBarrierOffset + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return base + kBarrierOffset + (Traits::kStages + stage) * 8;
  }
  __device__ __forceinline__ uint32_t mailbox(int consumer) const {
    return base + kBarrierOffset + Traits::kStages * 16 + consumer * 4;
  }
};

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
      args, smem, cta, Traits::kXBytes,
      [&](const GemmW4Segment& segment, int k, int stage) {
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

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ float load_global_float(const float* address) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
}

// A fragments of one group of 64 rows for the four k32 steps of a stage, unpacked from smem.
template <int kWeightBits>
__device__ __forceinline__ void load_w_fragments(uint32_t w_smem, int thread, uint32_t (&a)[16]) {
  if constexpr (kWeightBits == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = load_shared_16(w_smem + half * kFragmentBlockBytes + thread * 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[half * 8 + j] = unpack_low_nibbles_16x(words[j]);
        a[half * 8 + 4 + j] = unpack_high_nibbles_16x(words[j]);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 v = load_shared_16(w_smem + step * kFragmentBlockBytes + thread * 16);
      a[step * 4] = v.x, a[step * 4 + 1] = v.y, a[step * 4 + 2] = v.z, a[step * 4 + 3] = v.w;
    }
  }
}

// One consumer warpgroup: its threads' view of the tile, and the stages of its work.
template <typename Traits>
struct GemmW4Sm90Consumer {
  static constexpr int kM64 = Traits::kM64;
  static constexpr int kAccumulators = Traits::kAccumulators;

  const GemmW4Sm90Args& args;
  const GemmW4Sm90Smem<Traits>& smem;
  int consumer;  // 0 or 1
  int thread;    // 0 .. 127
  GemmW4CtaPosition cta;

  int32_t acc[kM64][kAccumulators];
  float scale[kM64][2];
  float bias[kM64][2];
  uint32_t a[2][kM64][16];  // fragments in use by wgmma, and those being unpacked for the next stage

  __device__ __forceinline__ GemmW4Sm90Consumer(const GemmW4Sm90Args& args_,
                                                const GemmW4Sm90Smem<Traits>& smem_, int consumer_,
                                                int thread_, const GemmW4CtaPosition& cta_)
      : args(args_), smem(smem_), consumer(consumer_), thread(thread_), cta(cta_) {}

  template <int kBuffer>
  __device__ __forceinline__ void fetch_fragments(int stage) {
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
      load_w_fragments<Traits::kWeightBits>(
          smem.w(stage) + (consumer * kM64 + mb) * Traits::kW64Bytes, thread, a[kBuffer][mb]);
  }

  // Tells every producer that writes to this stage that this warp has finished with it.
  __device__ __forceinline__ void release(int stage) {
    if constexpr (Traits::kCluster == 1) {
      if (thread % 32 == 0) mbarrier_arrive(smem.empty(stage));
    } else {
      if (thread % 32 < Traits::kCluster)
        mbarrier_arrive_cluster(smem.empty(stage), thread % 32);
    }
  }

  template <int kBuffer>
  __device__ __forceinline__ void multiply(int stage, bool first) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t x = wgmma_descriptor_128b(smem.x(stage)) + step * 2;
#pragma unroll
      for (int mb = 0; mb < kM64; ++mb)
        WgmmaS8<Traits::BLOCK_TOKENS>::mma(acc[mb], &a[kBuffer][mb][step * 4], x,
                                           step > 0 || !first);
    }
    wgmma_commit();
  }

  // One stage: start its wgmmas, and while they run retire the stage before and unpack the next.
  template <int kBuffer>
  __device__ __forceinline__ void iterate(PipelineCursor<Traits::kStages>& cursor, int& running,
                                          bool last) {
    multiply<kBuffer>(cursor.stage, running < 0);
    wgmma_wait<1>();
    if (running >= 0) release(running);
    running = cursor.stage;
    cursor.advance();
    if (!last) {
      mbarrier_wait(smem.full(cursor.stage), cursor.parity);
      fetch_fragments<1 - kBuffer>(cursor.stage);
    }
  }

  __device__ __forceinline__ void multiply_segment(const GemmW4Segment& segment,
                                                   PipelineCursor<Traits::kStages>& cursor) {
    const int iterations = segment.k_end - segment.k_begin;
    int running = -1;  // the stage whose wgmmas are in flight
    mbarrier_wait(smem.full(cursor.stage), cursor.parity);
    fetch_fragments<0>(cursor.stage);
    int i = 0;
    for (; i + 2 <= iterations; i += 2) {
      iterate<0>(cursor, running, false);
      iterate<1>(cursor, running, i + 2 == iterations);
    }
    if (i < iterations) iterate<0>(cursor, running, true);
    wgmma_wait<0>();
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb) wgmma_pin(acc[mb]);
    release(running);
  }

  __device__ __forceinline__ void sync() const { named_barrier_sync(1 + consumer, 128); }

  // Workspace slot of a cluster's first (0) or last (1) stream-K segment.
  __device__ __forceinline__ int4* partial_slot(int cluster, int which) const {
    constexpr int kSlotVectors = kM64 * kAccumulators / 4 * 128;
    const int64_t slot =
        ((int64_t{cluster} * 2 + which) * Traits::kCluster + cta.rank) * Traits::kConsumers + consumer;
    return args.partials + slot * kSlotVectors + thread;
  }

  // Meets the other clusters that share this tile. True for the last one to arrive, which then
  // holds the whole sum.
  __device__ bool reduce_partials(const GemmW4Segment& segment) {
    const int cluster = cta.cluster, clusters = cta.clusters;
    const int tile_begin = segment.stream_k_tile * args.k_iterations;
    const int mine = segment.k_end - segment.k_begin;
    if (mine == args.k_iterations) return true;
    int* counter = args.counters +
                   (segment.stream_k_tile * Traits::kCluster + cta.rank) * Traits::kConsumers + consumer;
    // If all others have been here, there is nobody to leave our part for.
    if (thread == 0) {
      const int arrived = *reinterpret_cast<volatile int*>(counter);
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem.mailbox(consumer)), "r"(arrived));
    }
    sync();
    int arrived;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(arrived) : "r"(smem.mailbox(consumer)));
    if (arrived + mine < args.k_iterations) {
      // A cluster's range starts inside this tile exactly if this is its first segment.
      const int begin = GemmW4Schedule::stream_k_begin(args, cluster, clusters);
      int4* slot = partial_slot(cluster, begin >= tile_begin ? 0 : 1);
#pragma unroll
      for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
        for (int i = 0; i < kAccumulators / 4; ++i)
          __stcg(slot + (mb * (kAccumulators / 4) + i) * 128,
                 make_int4(acc[mb][4 * i], acc[mb][4 * i + 1], acc[mb][4 * i + 2],
                           acc[mb][4 * i + 3]));
      __threadfence();
      sync();
      if (thread == 0) {
        arrived = atomicAdd(counter, mine);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem.mailbox(consumer)), "r"(arrived));
      }
      sync();
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(arrived) : "r"(smem.mailbox(consumer)));
      if (arrived + mine < args.k_iterations) return false;
    }
    __threadfence();
    if (thread == 0) *counter = 0;
    // The clusters whose ranges meet [tile_begin, tile_begin + k_iterations) are consecutive.
    for (int direction = -1; direction <= 1; direction += 2) {
      for (int other = cluster + direction; other >= 0 && other < clusters; other += direction) {
        const int begin = GemmW4Schedule::stream_k_begin(args, other, clusters);
        const int end = GemmW4Schedule::stream_k_begin(args, other + 1, clusters);
        if (end <= tile_begin || begin >= tile_begin + args.k_iterations) break;
        if (begin == end) continue;  // more clusters than iterations
        const int4* slot = partial_slot(other, begin >= tile_begin ? 0 : 1);
#pragma unroll
        for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
          for (int i = 0; i < kAccumulators / 4; ++i) {
            const int4 part = __ldcg(slot + (mb * (kAccumulators / 4) + i) * 128);
            acc[mb][4 * i] += part.x, acc[mb][4 * i + 1] += part.y;
            acc[mb][4 * i + 2] += part.z, acc[mb][4 * i + 3] += part.w;
          }
      }
    }
    return true;
  }

  // Sums the parts of K of the cluster's CTAs: every CTA lays its accumulators out in the memory of
  // its stages (all of them consumed), and adds up its share of the tokens over all CTAs into the
  // first registers of acc. Every thread of the cluster takes part in the two cluster barriers, the
  // second one is at the end of the kernel.
  __device__ __forceinline__ void reduce_split() {
    constexpr int kVectors = kAccumulators / 4;  // a vector = 8 tokens of this thread's fragment
    constexpr int kShare = kVectors / Traits::kSplitK;
    const auto vector_address = [&](int mb, int vector) {
      const int index = (consumer * kM64 + mb) * kVectors + vector;
      return smem.base + (index * 128 + thread) * 16;
    };
    named_barrier_sync(3, 128 * Traits::kConsumers);  // nobody reads the stages any more
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(vector_address(mb, i)),
                     "r"(acc[mb][4 * i]), "r"(acc[mb][4 * i + 1]), "r"(acc[mb][4 * i + 2]),
                     "r"(acc[mb][4 * i + 3])
                     : "memory");
    cluster_sync();
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        int32_t sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int part = 0; part < Traits::kSplitK; ++part) {
          int32_t v[4];
          asm volatile(
              "{\n"
              ".reg .b32 remote;\n"
              "mapa.shared::cluster.u32 remote, %4, %5;\n"
              "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote];\n"
              "}"
              : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
              : "r"(vector_address(mb, cta.k_part * kShare + i)), "r"(part)
              : "memory");
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[c] += v[c];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mb][4 * i + c] = sum[c];
      }
  }

  // Channel scales and biases of this thread's two rows of each group of 64. They are read before
  // the main loop, which hides the latency; volatile, so that the loads are not sunk to their use.
  __device__ __forceinline__ void load_row_constants(const GemmW4Segment& segment) {
    const EpilogueArgs& e = args.epilogue;
    constexpr float kUnpackFactor = Traits::kWeightBits == 4 ? 1.0f / kUnpackedW4Factor : 1.0f;
    const float input_scale = load_global_float(e.input_scale);
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_channel(segment, mb) + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
        const int channel = min(row, e.n - 1);
        scale[mb][h] =
            __fmul_rn(input_scale, load_global_float(e.weight_scale + channel)) * kUnpackFactor;
        bias[mb][h] = e.bias != nullptr ? load_as_float(e.bias, e.bias_dtype, channel) : 0.0f;
      }
  }
  __device__ __forceinline__ int first_channel(const GemmW4Segment& segment, int mb) const {
    return (segment.row_tile * Traits::kCluster + cta.rank) * Traits::BLOCK_ROWS +
           (consumer * kM64 + mb) * 64;
  }
  // y + 0 would turn -0 into +0, so a missing bias is skipped, not added.
  __device__ __forceinline__ float dequantize(int32_t value, int mb, int h) const {
    const float y = __fmul_rn(__int2float_rn(value), scale[mb][h]);
    return args.epilogue.bias != nullptr ? __fadd_rn(y, bias[mb][h]) : y;
  }

  // 16-bit output: transpose through shared memory, 64 channels x kStagingTokens at a time.
  template <bool kIsBf16>
  __device__ __forceinline__ void store_16bit(int first_channel, int first_token, int mb) {
    const EpilogueArgs& e = args.epilogue;
    const int lane = thread % 32, warp = thread / 32;
    const uint32_t staging = smem.staging(consumer);
    const bool plain_vectors = e.vectors && !e.swiglu && e.residual == nullptr &&
                               e.output_scale == nullptr && first_channel + 64 <= e.n;
#pragma unroll
    for (int part = 0; part < Traits::kFinalTokens / Traits::kStagingTokens; ++part) {
      const int part_token = first_token + part * Traits::kStagingTokens;
      if (part_token >= e.m) break;
      if (part > 0 || mb > 0) sync();  // the part before has been read
#pragma unroll
      for (int i = 0; i < Traits::kStagingTokens / 16; ++i) {
        // Four 8x8 matrices: channels 0-7 and 8-15 of the warp, tokens 0-7, then tokens 8-15.
        const int32_t* d = &acc[mb][part * Traits::kStagingTokens / 2 + i * 8];
        const uint32_t r0 = pack_16bit<kIsBf16>(dequantize(d[0], mb, 0), dequantize(d[1], mb, 0));
        const uint32_t r1 = pack_16bit<kIsBf16>(dequantize(d[2], mb, 1), dequantize(d[3], mb, 1));
        const uint32_t r2 = pack_16bit<kIsBf16>(dequantize(d[4], mb, 0), dequantize(d[5], mb, 0));
        const uint32_t r3 = pack_16bit<kIsBf16>(dequantize(d[6], mb, 1), dequantize(d[7], mb, 1));
        // Row of the stored matrix = token; 16-byte chunks are swizzled by it against conflicts.
        const int token = i * 16 + lane / 16 * 8 + lane % 8;
        const int chunk = warp * 2 + lane / 8 % 2;
        const uint32_t address = staging + token * 128 + ((chunk ^ (token & 7)) << 4);
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
            "r"(r0), "r"(r1), "r"(r2), "r"(r3)
            : "memory");
      }
      sync();
      const int chunk = thread % 8;
      const int channel = first_channel + chunk * 8;
      const int tokens = channel < e.n ? min(Traits::kStagingTokens, e.m - part_token) : 0;
      const auto staged = [&](int token) {
        return load_shared_16(staging + token * 128 + ((chunk ^ (token & 7)) << 4));
      };
      if (plain_vectors) {
        uint16_t* out = static_cast<uint16_t*>(e.out) + part_token * e.out_row_stride + channel;
#pragma unroll
        for (int i = 0; i < Traits::kStagingTokens / 16; ++i) {
          const int token = i * 16 + thread / 8;
          if (token < tokens)
            *reinterpret_cast<uint4*>(out + token * e.out_row_stride) = staged(token);
        }
      } else {
#pragma unroll 1
        for (int token = thread / 8; token < tokens; token += 16)
          finish_and_store_8(e, staged(token), channel, part_token + token);
      }
    }
  }

  // 32-bit output straight from registers: eight lanes cover one 32-byte sector of a token's row.
  __device__ __forceinline__ void store_32bit(int first_channel, int first_token, int mb) const {
    const EpilogueArgs& e = args.epilogue;
    const int lane = thread % 32, warp = thread / 32;
    constexpr int kShift = Traits::kWeightBits == 4 ? 4 : 0;  // acc holds 16x the sum
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = first_channel + warp * 16 + lane / 4 + 8 * h;
      if (channel >= e.n) continue;
#pragma unroll
      for (int i = 0; i < Traits::kFinalTokens / 4; ++i) {
        const int token = first_token + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (token >= e.m) break;
        const int32_t value = acc[mb][i / 2 * 4 + 2 * h + i % 2];
        static_cast<uint32_t*>(e.out)[token * e.out_row_stride + channel] =
            e.out_dtype == GemmDtype::kInt32 ? static_cast<uint32_t>(value >> kShift)
                                             : __float_as_uint(dequantize(value, mb, h));
      }
    }
  }

  __device__ __forceinline__ void store(const GemmW4Segment& segment) {
    const int first_token =
        segment.token_tile * Traits::BLOCK_TOKENS + cta.k_part * Traits::kFinalTokens;
    sync();  // the staging buffer is free: every warp has read the tile before
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb) {
      const int channel = first_channel(segment, mb);
      if (channel >= args.epilogue.n) break;
      switch (args.epilogue.out_dtype) {
        case GemmDtype::kFloat16: store_16bit<false>(channel, first_token, mb); break;
        case GemmDtype::kBFloat16: store_16bit<true>(channel, first_token, mb); break;
        case GemmDtype::kFloat32:
        case GemmDtype::kInt32: store_32bit(channel, first_token, mb); break;
      }
    }
  }
};

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
      mbarrier_init(smem.empty(stage), Traits::kCluster * Traits::kConsumers * 4);  // every warp
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
  const GemmW4CtaPosition cta{static_cast<int>(blockIdx.x) / kClusterSize,
                              static_cast<int>(gridDim.x) / kClusterSize,
                              Traits::kCluster > 1 ? cta_rank : 0,
                              Traits::kSplitK > 1 ? cta_rank : 0};
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
        if (segment.stream_k_tile < 0 || consumer.reduce_partials(segment))
          consumer.store(segment);
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
