// SPDX-License-Identifier: Apache-2.0
//
// Geometry of the Hopper GEMM (gemm_w4_sm90.cuh): tile traits, kernel arguments, shared memory map,
// and the schedule that says which part of which tile a cluster computes next.
#pragma once

#include <cstdint>

#include "prefixquant/epilogue.cuh"
#include "prefixquant/layout_w4.h"

namespace prefixquant {

inline constexpr int kSm90SmemLimit = 232448;  // bytes a block can have on sm_90 (227 KB)

template <int kWeightBits_,   // 4 or 8
          int kM64_,          // groups of 64 channels a consumer warpgroup owns
          int BLOCK_TOKENS_,  // N of the wgmma
          int kCluster_,      // CTAs of a cluster that share the activations, on different channels
          int kSplitK_ = 1>   // CTAs of a cluster that share one tile, on different parts of K
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
  static constexpr int kStagingTokens = kFinalTokens % 64 == 0   ? 64
                                        : kFinalTokens % 32 == 0 ? 32
                                                                 : 16;
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
  // Arrivals that empty a stage: all threads of the consumers, and a lane a warp of the other CTAs.
  static constexpr int kStageReaders = kConsumers * 128 + (kCluster - 1) * kConsumers * 4;

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
  int k_iterations;  // padded K / 128
  int row_groups;    // groups of 64 rows in the prepacked weight
  int row_tiles;     // cluster tiles along the channels
  int token_tiles;
  int token_tile_group;  // token tiles visited before moving on along the channels (L2 reuse)
  int dp_tiles;          // cluster tiles computed whole
  int stream_k_tiles;    // cluster tiles cut along K
  int* counters;         // [stream_k_tiles, kCluster, 2], zero before and after each launch
  int4* partials;        // [clusters, 2, kCluster, 2] slots of one warpgroup's accumulators
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
  // Where one thread tells its warpgroup an arrival count, before (0) and after (1) its own part is
  // stored. Two words: the barrier between the two phases is what makes reuse of each one safe.
  __device__ __forceinline__ uint32_t mailbox(int consumer, int phase) const {
    return base + kBarrierOffset + Traits::kStages * 16 + consumer * 8 + phase * 4;
  }
};

}  // namespace prefixquant
