// SPDX-License-Identifier: Apache-2.0
// What the KV attention kernels do before the first tile of a row: the hint to L2 while kernels
// ahead still run, the queries, the prefix tokens.
#pragma once

#include "prefixquant/kv_attention_state.cuh"

namespace prefixquant {

// Starts bringing the first of rows begin .. end - 1 of a sequence from memory to L2. Run before
// the kernels ahead in the stream have finished, so all it reads may be old: it is a hint, and
// reads through L2 only. By lines and all threads: the bulk form holds up the copies behind it.
template <typename C>
__device__ __forceinline__ void prefetch_rows(const KvAttentionArgs& a, int b, int head, int begin,
                                              int end) {
  constexpr int kLine = 128;
  const int bytes = min(end - begin, a.prefetch_bytes / (2 * C::kRowBytes)) * C::kRowBytes;
#pragma unroll 1
  for (int at = threadIdx.x * kLine; at < bytes; at += C::kThreads * kLine) {
    const int row = begin + at / C::kRowBytes;
    int page = b, in_page = row;
    if (a.cache.block_table != nullptr) {
      const int entry = a.cache.page_size.divide(row, in_page);
      page = __ldcg(a.cache.block_table + b * a.cache.block_table_stride + entry);
      if (page < 0 || page >= a.cache.pages) continue;
    }
    const int64_t in_head = static_cast<int64_t>(in_page) * C::kRowBytes + at % C::kRowBytes;
    prefetch_l2(a.cache.k + page * a.cache.k_page_stride + head * a.cache.k_head_stride + in_head);
    prefetch_l2(a.cache.v + page * a.cache.v_page_stride + head * a.cache.v_head_stride + in_head);
  }
}

// What a row needs besides the cache, in flight before its first use.
template <typename C>
struct KvRowLoads {
  static constexpr bool kPrefixEarly = C::kDim <= 128;  // registers decide
  KvQueries<C> queries;
  KvPrefixToken<C> prefix;  // the first one of this warp
  float k_scale, v_scale;
  int first_prefix;  // a.prefix: none

  __device__ __forceinline__ KvRowLoads(const KvAttentionArgs& a, const KvRow& row, int first,
                                        int lane)
      : queries(a, row, lane),
        k_scale(scale_of(a.k_scale, row.head)),
        v_scale(scale_of(a.v_scale, row.head)),
        first_prefix(first) {
    if (kPrefixEarly && first < a.prefix) prefix.load(a, row, first, lane);
  }
};

// An empty state for a row, and in it the prefix tokens first_prefix, + kWarps, ...
template <typename C>
__device__ __forceinline__ void begin_segment(KvWarpState<C>& state, const KvAttentionArgs& a,
                                              const KvRow& row, KvRowLoads<C>& loads, int lane) {
  begin_row<C>(state, loads.queries, a, loads.k_scale, lane);
#pragma unroll 1
  for (int token = loads.first_prefix; token < a.prefix; token += C::kWarps) {
    if (!loads.kPrefixEarly || token != loads.first_prefix) {
      loads.prefix.load(a, row, token, lane);
    }
    attend_prefix<C>(state, loads.queries, loads.prefix, a, loads.v_scale, lane);
  }
}

}  // namespace prefixquant
