// SPDX-License-Identifier: Apache-2.0
// The KV attention kernel for few rows: each row (sequence, KV head, group of columns) has its own
// CTAs, either one cluster of them or up to kKvMaxRowCtas that know each other through global
// memory. Nothing is planned and no atomic operation is waited for: a short sequence costs little
// more than the latency of its loads. kv_attention_launch.cuh says when; kv_attention.cuh is the
// kernel for the rest and has the layouts.
//
// Split: CTA r of the row's n takes tiles [r T / n, (r + 1) T / n) of its T, the warps in turn.
// Merge: the warps' pieces in shared memory; then, by units of 64 channels of a column,
//   cluster   unit u of every CTA goes to CTA u % n through distributed shared memory, completing
//             on its mbarrier, and one warp there puts the n together
//   others    to CTA n - 1 - u through global memory, in words that carry a mark of being there
//             (kv_attention_marked.cuh): one way there and no fence
// Order: pieces are added in the order of the CTAs: the same bits every time.
#pragma once

#include "prefixquant/kv_attention_attend.cuh"
#include "prefixquant/kv_attention_begin.cuh"
#include "prefixquant/kv_attention_finish.cuh"
#include "prefixquant/kv_attention_marked.cuh"

namespace prefixquant {

inline constexpr int kKvMaxClusterShift = 3;  // 8 CTAs: as many as every sm_90 takes
inline constexpr int kKvMaxCluster = 1 << kKvMaxClusterShift;

inline constexpr int kKvSentBytes = 8 + 4 * kKvSpan;  // of a unit: maximum and sum, 64 channels

// Where a CTA receives one unit of each CTA of its cluster: maxima and sums, then the channels.
struct KvReceivedUnit {
  float2* base;
  int ctas;

  __device__ __forceinline__ KvReceivedUnit(float2* received, int unit, int shift)
      : base(received + ((unit >> shift) << shift) * (kKvSentBytes / 8)), ctas(1 << shift) {}
  __device__ __forceinline__ float2* head(int from) const { return base + from; }
  __device__ __forceinline__ float2* part(int from, int lane) const {
    return base + ctas + from * (kKvSpan / 2) + lane;
  }
};

// Units of a row that CTA `rank` of 2^shift puts together.
__host__ __device__ constexpr int kv_units_of(int units, int rank, int shift) {
  return (units - rank + (1 << shift) - 1) >> shift;
}

template <typename C>
inline int kv_attention_cluster_smem_bytes(int merge_columns, int shift) {
  const int units = kv_units_of(merge_columns * kv_spans(C::kDim), 0, shift);
  return C::kWarps * (C::Ring::kBytes + 8 * C::kStages) + 16 +
         KvMergeAreaOf<C>::floats(merge_columns) * 4 +
         (shift > 0 ? (units * kKvSentBytes) << shift : 0);
}

// The tokens of a row that this CTA attends.
template <typename C>
__device__ __forceinline__ void set_length(KvSegment& segment, int length,
                                           const FastDivisor& by_ctas, int& begin, int& end) {
  const int tiles = (length + C::kTokens - 1) / C::kTokens, cta = blockIdx.x;
  segment.length = length;
  begin = by_ctas.divide(cta * tiles) * C::kTokens;
  end = min(length, static_cast<int>(by_ctas.divide((cta + 1) * tiles)) * C::kTokens);
}

// Sends this lane's channels of a unit, and from lane 0 its maximum and sum, to CTA `owner`, which
// has room for it at the address that `room` has here.
__device__ __forceinline__ void send_unit(const KvReceivedUnit& room, const KvMergedUnit& unit,
                                          uint32_t barrier, int owner, int lane) {
  const int from = blockIdx.x;
  if (lane == 0) {
    cluster_send_int2(smem_address(room.head(from)),
                      {__float_as_int(unit.top), __float_as_int(unit.total)}, barrier, owner);
  }
  cluster_send_int2(smem_address(room.part(from, lane)),
                    {__float_as_int(unit.o.x), __float_as_int(unit.o.y)}, barrier, owner);
}

__device__ __forceinline__ KvMergedUnit merge_received(const KvReceivedUnit& received, int lane) {
  float top[kKvMaxCluster], total[kKvMaxCluster], factor[kKvMaxCluster];
  float2 part[kKvMaxCluster];
#pragma unroll
  for (int j = 0; j < kKvMaxCluster; j += 2) {
    const float4 two = *reinterpret_cast<const float4*>(received.head(j));
    const bool there = j < received.ctas;  // and so is j + 1
    top[j] = there ? two.x : minus_infinity();
    total[j] = there ? two.y : 0.0f;
    top[j + 1] = there ? two.z : minus_infinity();
    total[j + 1] = there ? two.w : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kKvMaxCluster; ++j) {
    part[j] = {0.0f, 0.0f};
    if (j < received.ctas) part[j] = *received.part(j, lane);
  }
  KvMergedUnit merged = weigh_heads(top, total, factor);
#pragma unroll
  for (int j = 0; j < kKvMaxCluster; ++j) {
    merged.o.x += factor[j] * part[j].x, merged.o.y += factor[j] * part[j].y;
  }
  return merged;
}

// The CTA that puts a unit together through global memory. It waits for all others of the row, also
// for those behind it in the grid: the launch has no more CTAs than SMs, a row's follow each other,
// and only its last ones wait, so that a row that has begun gets its CTAs.
__device__ __forceinline__ int collector_of(int unit, int ctas) {
  while (unit >= ctas) unit -= ctas;
  return ctas - 1 - unit;
}

// The end of a row: the warps' pieces together, and then those of the row's CTAs.
template <typename C>
__device__ __forceinline__ void finish_row(KvWarpState<C>& state, const KvAttentionArgs& a,
                                           const KvRow& row, float v_scale, float* merge,
                                           float2* received, uint32_t barrier, int warp, int lane) {
  constexpr int kSpans = kv_spans(C::kDim);
  const int shift = a.cluster_shift, ctas = gridDim.x, cta = blockIdx.x;
  const KvMergeAreaOf<C> area{merge, a.merge_columns};
  store_piece<C>(state, area, row.columns, warp, lane);
  __syncthreads();
  if (shift > 0) cluster_wait_acquire();  // the barriers of all CTAs are initialised
  for_units<C::kDim, C::kWarps>(row.columns, warp, lane, [&](int unit, int column, int channel) {
    KvMergedUnit merged = area.merge(column, channel, channel < C::kDim);
    if (shift > 0) {
      return send_unit({received, unit, shift}, merged, barrier, unit & (ctas - 1), lane);
    }
    if (ctas > 1) {
      const int units = a.merge_columns * kSpans;
      KvMarkedPair* const all =
          reinterpret_cast<KvMarkedPair*>(a.counters) +
          ((blockIdx.z * gridDim.y + blockIdx.y) * units + unit) * ctas * kKvMarkedPairs;
      if (cta != collector_of(unit, ctas)) {
        return mark_unit(all + cta * kKvMarkedPairs, merged, lane);
      }
      collect_units(all, merged, cta, ctas, lane);
    }
    store_output(a, row, C::kDim, column, channel, merged, v_scale);
  });
  const int first = cta + (warp << shift), units = row.columns * kSpans;
  if (shift == 0 || first >= units) return;
  cluster_wait_received(barrier);
#pragma unroll 1
  for (int unit = first; unit < units; unit += C::kWarps << shift) {
    const KvMergedUnit merged = merge_received({received, unit, shift}, lane);
    store_output(a, row, C::kDim, unit / kSpans, unit % kSpans * kKvSpan + 2 * lane, merged,
                 v_scale);
  }
}

template <typename C>
__device__ __forceinline__ void attend_cluster(const KvAttentionArgs& a, unsigned char* smem) {
  using Ring = typename C::Ring;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int shift = a.cluster_shift;
  KvSegment segment{};
  segment.b = blockIdx.z;
  segment.head = a.rows.by_groups.divide(blockIdx.y, segment.group);
  const KvRow row(a, segment);
  int length = kv_length(a.rows, segment.b), begin, end, ahead = 0;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(smem + C::kWarps * Ring::kBytes);
  const uint32_t receive = smem_address(barriers + C::kWarps * C::kStages);
  float* const merge = reinterpret_cast<float*>(barriers + C::kWarps * C::kStages + 2);
  float2* const received =
      reinterpret_cast<float2*>(merge + KvMergeAreaOf<C>::floats(a.merge_columns));
  Ring ring(smem + warp * Ring::kBytes, barriers + warp * C::kStages, lane);
  if (shift > 0) {
    const int units = kv_units_of(row.columns * kv_spans(C::kDim), blockIdx.x, shift);
    if (units > 0) prepare_to_receive(receive, (units * kKvSentBytes) << shift);
    cluster_arrive_relaxed();
  }
  set_length<C>(segment, length, a.by_row_ctas, begin, end);
  prefetch_rows<C>(a, segment.b, segment.head, begin, end);
  grid_dependency_wait();

  // The last warps of the row, which have no tile where tokens are few, take the prefix.
  KvRowLoads<C> loads(a, row, blockIdx.x + 1 == gridDim.x ? C::kWarps - 1 - warp : a.prefix, lane);
  constexpr int kStep = C::kWarps * C::kTokens;
  const auto produce = [&](int stage) {
    const int rows = min(C::kTokens, end - ahead);
    if (rows > 0) ring.issue(stage, a.cache, segment.b, segment.head, ahead, rows);
    ahead += kStep;
  };
  uint32_t phases = 0;  // bit i: of the barrier of stage i
  // The first copies do not wait for the length: it seldom changes this late. What was copied for
  // a length that did change is dropped. A block table, however, is not read beyond the length.
  const int final_length = kv_length(a.rows, segment.b);
  if (a.cache.block_table != nullptr) length = final_length;
#pragma unroll 1
  while (true) {
    set_length<C>(segment, length, a.by_row_ctas, begin, end);
    ahead = begin + warp * C::kTokens;
#pragma unroll 1
    for (int stage = 0; stage < C::kStages && ahead < end; ++stage) produce(stage);
    if (final_length == length) break;
    ahead = begin + warp * C::kTokens;
#pragma unroll 1
    for (int stage = 0; stage < C::kStages && ahead < end; ++stage, ahead += kStep) {
      ring.wait(stage, phases >> stage & 1);
      phases ^= 1u << stage;
    }
    __syncwarp();
    length = final_length;
  }
  KvWarpState<C> state;
  begin_segment<C>(state, a, row, loads, lane);

  int stage = 0;
#pragma unroll 1
  for (int token = begin + warp * C::kTokens; token < end; token += kStep) {
    ring.wait(stage, phases >> stage & 1);
    phases ^= 1u << stage;
    attend_tile<C>(state, a, segment, ring.k_rows(stage), ring.v_rows(stage), token, end, lane);
    __syncwarp();
    produce(stage);
    if (++stage == C::kStages) stage = 0;
  }
  grid_dependency_launch();
  finish_row<C>(state, a, row, loads.v_scale, merge, received, receive, warp, lane);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    kv_attention_cluster_kernel(const __grid_constant__ KvAttentionArgs a) {
  static_assert(C::kBulk, "clusters come with sm_90");
  extern __shared__ __align__(128) unsigned char smem[];
#if __CUDA_ARCH__ >= 900
  attend_cluster<C>(a, smem);
#endif
}

}  // namespace prefixquant
