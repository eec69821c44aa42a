// SPDX-License-Identifier: Apache-2.0
// Attention of few query tokens over [16-bit prefix | KV cache], split over the cache.
//
// Computes what kv_attention.h says. A row is (sequence, KV head, group of 8 columns); a column is
// one (query token, query head of the group). For a tile of tokens, one warp computes
//   S^T = K Q^T      tokens are the rows of the MMA, columns its N = 8
//   O^T = V^T P^T    channels are the rows; P^T is S^T's accumulator, transposed lane by lane
// Layout: K and V are read as they lie in the cache (kv_fragments.cuh); a lane takes 1/4 of a K row
//   and 1/8 of a V row, so that no shuffle is needed and copies stay linear.
// Grid: any number of CTAs (kv_schedule.cuh), kWarps warps each. The warps of a CTA share a segment
//   tile by tile, each with its own pipeline and its own softmax state, and merge at its end.
// Smem: kWarps * (kStages tiles of K and V) + the merge area; see kv_attention_smem_bytes.
// Limits: D of 64, 96, 128, 256; a 16-bit cache has the dtype of q.
#pragma once

#include "prefixquant/kv_attention_attend.cuh"
#include "prefixquant/kv_attention_begin.cuh"
#include "prefixquant/kv_attention_finish.cuh"

namespace prefixquant {

// What a warp needs seldom: in shared memory, because registers decide how many CTAs an SM holds.
struct alignas(16) KvWarpPlan {
  KvSegment segment;  // being attended
  KvSegment ahead;    // being copied
  KvSchedule schedule;
};

template <typename C>
inline int kv_attention_smem_bytes(int merge_columns) {
  const int plan = static_cast<int>(sizeof(KvWarpPlan));
  return C::kWarps * (C::Ring::kBytes + 8 * C::kStages + plan) +
         KvMergeAreaOf<C>::floats(merge_columns) * 4 + 16;
}

// Keeps what all lanes have computed alike.
template <typename T>
__device__ __forceinline__ void keep(T& to, const T& from, int lane) {
  __syncwarp();
  if (lane == 0) to = from;
  __syncwarp();
}

// Finds this CTA's first segment; false if it has none. Returns when the kernels ahead in the
// stream have finished. Lengths seldom change this late: what was planned with the early ones is
// checked, not redone. The loop keeps one copy of the code: cold instructions cost, too.
template <typename C>
__device__ __forceinline__ bool plan_warp(const KvAttentionArgs& a, KvWarpPlan& plan, int lane) {
  KvSchedule schedule;
  KvSegment segment;
#pragma unroll 1
  for (bool early = true;; early = false) {
    const int planned = lane_length(a.rows, lane);
    segment = kv_first_segment(a.rows, schedule, planned, lane);
    if (!early) break;
    if (segment.remaining >= 0) {
      prefetch_rows<C>(a, segment.b, segment.head, segment.token_begin(a.rows),
                       segment.token_end(a.rows));
    }
    grid_dependency_wait();
    const bool same = a.rows.batch <= 32 && lane_length(a.rows, lane) == planned;
    if (__all_sync(~0u, same)) break;
  }
  keep(plan, {segment, segment, schedule}, lane);
  return segment.remaining >= 0;
}

template <typename C>
__device__ __forceinline__ void attend_cta(const KvAttentionArgs& a, unsigned char* smem) {
  using Ring = typename C::Ring;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(smem + C::kWarps * Ring::kBytes);
  KvWarpPlan& plan = reinterpret_cast<KvWarpPlan*>(barriers + C::kWarps * C::kStages)[warp];
  float* const merge = reinterpret_cast<float*>(barriers + C::kWarps * C::kStages) +
                       C::kWarps * (sizeof(KvWarpPlan) / 4);
  int* const last_flag = reinterpret_cast<int*>(merge + KvMergeAreaOf<C>::floats(a.merge_columns));
  Ring ring(smem + warp * Ring::kBytes, barriers + warp * C::kStages, lane);
  if (!plan_warp<C>(a, plan, lane)) return;

  // The producing side of this warp runs kStages tiles ahead, across segments.
  constexpr int kStep = C::kWarps * C::kTokens;
  int ahead_token = plan.ahead.token_begin(a.rows) + warp * C::kTokens;
  int ahead_end = plan.ahead.token_end(a.rows), ahead_b = plan.ahead.b,
      ahead_head = plan.ahead.head;
  const auto produce = [&](int stage) {
    if (ahead_token >= ahead_end && plan.ahead.remaining > 0) {
      KvSegment ahead = plan.ahead;
#pragma unroll 1
      do {
        ahead.next(a.rows);
        ahead_token = ahead.token_begin(a.rows) + warp * C::kTokens;
        ahead_end = ahead.token_end(a.rows);
      } while (ahead_token >= ahead_end && ahead.remaining > 0);
      ahead_b = ahead.b, ahead_head = ahead.head;
      keep(plan.ahead, ahead, lane);
    }
    const int rows = min(C::kTokens, ahead_end - ahead_token);
    if (rows > 0) {
      ring.issue(stage, a.cache, ahead_b, ahead_head, ahead_token, rows);
      ahead_token += kStep;
    }
    ring.commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < C::kStages; ++stage) produce(stage);

  int stage = 0;
  uint32_t phase = 0;
#pragma unroll 1
  while (true) {
    KvWarpState<C> state;
    {
      const KvRow row(a, plan.segment);
      KvRowLoads<C> loads(a, row, plan.segment.first == 0 ? warp : a.prefix, lane);
      begin_segment<C>(state, a, row, loads, lane);
    }
    const int end = plan.segment.token_end(a.rows);
#pragma unroll 1
    for (int token = plan.segment.token_begin(a.rows) + warp * C::kTokens; token < end;
         token += kStep) {
      ring.wait(stage, phase);
      attend_tile<C>(state, a, plan.segment, ring.k_rows(stage), ring.v_rows(stage), token, end,
                     lane);
      __syncwarp();
      produce(stage);
      if (++stage == C::kStages) stage = 0, phase ^= 1;
    }
    const bool done = plan.segment.remaining == 0;
    if (done) grid_dependency_launch();
    finish_segment<C>(state, a, plan.segment, plan.schedule, merge, last_flag, warp, lane);
    if (done) break;
    KvSegment following = plan.segment;
    following.next(a.rows);
    keep(plan.segment, following, lane);
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    kv_attention_kernel(const __grid_constant__ KvAttentionArgs a) {
  extern __shared__ __align__(128) unsigned char smem[];
#if __CUDA_ARCH__ >= 900
  attend_cta<C>(a, smem);
#else
  if constexpr (!C::kBulk) attend_cta<C>(a, smem);  // the others are launched on sm_90 and later
#endif
}

}  // namespace prefixquant
