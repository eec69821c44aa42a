// SPDX-License-Identifier: Apache-2.0
// How one warp of the KV attention kernel gets its tiles of the cache: a ring of stages in shared
// memory that belongs to the warp alone, so no warp waits for another one.
//
// A stage holds kTokens rows of K, then kTokens rows of V, packed as the cache has them. On sm_90 a
// lane hands whole runs of rows to the bulk copy engine, completing on the stage's mbarrier; before
// sm_90 (and where kBulk is false) each lane copies 16-byte granules by cp.async.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/fast_divisor.h"
#include "prefixquant/kv_attention.h"
#include "prefixquant/mbarrier.cuh"
#include "prefixquant/tma.cuh"

namespace prefixquant {

// Where the rows of the cache are; see KvAttentionGpuParams.
struct KvCacheView {
  const uint8_t* k;
  const uint8_t* v;
  int64_t k_page_stride, k_head_stride;  // bytes
  int64_t v_page_stride, v_head_stride;
  const int32_t* block_table;
  int64_t block_table_stride;
  FastDivisor page_size;
  int64_t pages;
  int run;  // rows from a multiple of `run` on lie in one page; a power of two
};

template <int kTokens, int kRowBytes, int kStages, bool kBulk>
struct KvTileRing {
  static constexpr int kHalfBytes = kTokens * kRowBytes;
  static constexpr int kStageBytes = 2 * kHalfBytes;
  static constexpr int kBytes = kStages * kStageBytes;  // of one warp, without its barriers
  static_assert(kRowBytes % 16 == 0, "copies move 16 bytes");

  unsigned char* tiles;  // this warp's stages
  uint32_t tiles_address;
  uint32_t barriers;  // this warp's kStages mbarriers
  int lane;

  __device__ __forceinline__ KvTileRing(unsigned char* warp_tiles, uint64_t* warp_barriers,
                                        int lane_index)
      : tiles(warp_tiles),
        tiles_address(smem_address(warp_tiles)),
        barriers(smem_address(warp_barriers)),
        lane(lane_index) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBulk) {
      if (lane < kStages) mbarrier_init(barriers + 8 * lane, 1);
      fence_mbarrier_init();
      __syncwarp();
    }
#endif
  }

  // Offsets in bytes of a row of head `head` of sequence `b`.
  __device__ __forceinline__ static void locate(const KvCacheView& c, int b, int head, int token,
                                                int64_t& k_offset, int64_t& v_offset) {
    int page = b, row = token;
    if (c.block_table != nullptr) {
      const int entry = c.page_size.divide(token, row);
      page = c.block_table[b * c.block_table_stride + entry];
    }
    k_offset = page * c.k_page_stride + head * c.k_head_stride + row * kRowBytes;
    v_offset = page * c.v_page_stride + head * c.v_head_stride + row * kRowBytes;
  }

  // Starts the copy of rows token .. token + rows - 1. All lanes; earlier reads of the stage are
  // ordered before it by the caller's __syncwarp.
  __device__ __forceinline__ void issue(int stage, const KvCacheView& c, int b, int head, int token,
                                        int rows) {
    const uint32_t k_smem = tiles_address + stage * kStageBytes, v_smem = k_smem + kHalfBytes;
#if __CUDA_ARCH__ >= 900
    if constexpr (kBulk) {
      const uint32_t barrier = barriers + 8 * stage;
      if (lane == 0) mbarrier_arrive_expect_tx(barrier, 2 * rows * kRowBytes);
      __syncwarp();
      const int row = lane * c.run;
      if (row < rows) {
        int64_t k_offset, v_offset;
        locate(c, b, head, token + row, k_offset, v_offset);
        const uint32_t bytes = min(c.run, rows - row) * kRowBytes;
        bulk_load(k_smem + row * kRowBytes, c.k + k_offset, bytes, barrier, kL2EvictFirst);
        bulk_load(v_smem + row * kRowBytes, c.v + v_offset, bytes, barrier, kL2EvictFirst);
      }
      return;
    }
#endif
    constexpr int kGranules = kRowBytes / 16;
#pragma unroll
    for (int i = 0; i < (kTokens * kGranules + 31) / 32; ++i) {
      const int granule = lane + 32 * i, row = granule / kGranules;
      if (row < rows) {
        int64_t k_offset, v_offset;
        locate(c, b, head, token + row, k_offset, v_offset);
        const int column = granule % kGranules * 16;
        cp_async_16(k_smem + granule * 16, c.k + k_offset + column, 16);
        cp_async_16(v_smem + granule * 16, c.v + v_offset + column, 16);
      }
    }
  }

  // Ends one step of the pipeline: cp.async counts steps, with or without copies in them.
  __device__ __forceinline__ void commit() {
    if constexpr (!kBulk) cp_async_commit();
  }

  // Waits until the oldest stage has arrived and all lanes may read it.
  __device__ __forceinline__ void wait(int stage, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBulk) {
      mbarrier_wait(barriers + 8 * stage, phase);
      return;
    }
#endif
    cp_async_wait<kStages - 1>();
    __syncwarp();
  }

  __device__ __forceinline__ const unsigned char* k_rows(int stage) const {
    return tiles + stage * kStageBytes;
  }
  __device__ __forceinline__ const unsigned char* v_rows(int stage) const {
    return tiles + stage * kStageBytes + kHalfBytes;
  }
};

// kBytes bytes of shared memory into words; `from` has the alignment that kBytes leaves it. A last
// half word is zero-extended.
template <int kBytes>
__device__ __forceinline__ void load_words(uint32_t (&words)[(kBytes + 3) / 4],
                                           const unsigned char* from) {
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 8; ++i) {
      const uint2 v = reinterpret_cast<const uint2*>(from)[i];
      words[2 * i] = v.x, words[2 * i + 1] = v.y;
    }
  } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
  } else {
    static_assert(kBytes % 2 == 0, "rows are cut at 16 bits");
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      words[i] = halves[2 * i] | static_cast<uint32_t>(halves[2 * i + 1]) << 16;
    }
    words[kBytes / 4] = halves[kBytes / 2 - 1];
  }
}

}  // namespace prefixquant
