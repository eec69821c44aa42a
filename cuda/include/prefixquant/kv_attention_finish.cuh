// SPDX-License-Identifier: Apache-2.0
// The end of a segment of the KV attention kernel: the warps' pieces become the row's output or,
// where other CTAs share the row, one piece of it in global memory.
#pragma once

#include "prefixquant/kv_attention_state.cuh"

namespace prefixquant {

template <typename C>
using KvMergeAreaOf = KvMergeArea<C::kWarps, C::kPitch>;

// This warp's piece into the merge area.
template <typename C>
__device__ __forceinline__ void store_piece(KvWarpState<C>& w, const KvMergeAreaOf<C>& area,
                                            int columns, int warp, int lane) {
  constexpr int kPerGroup = C::kDim / 8;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) w.total[c] += __shfl_xor_sync(~0u, w.total[c], step);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = 2 * t + c;
    if (column >= columns) continue;
    if (g == 0) area.tops(column)[warp] = w.top[c], area.totals(column)[warp] = w.total[c];
    float* to = area.outputs(warp, column) + g * kPerGroup;
#pragma unroll
    for (int i = 0; i < kPerGroup / 4; ++i) {
      *reinterpret_cast<float4*>(to + 4 * i) =
          make_float4(w.o[2 * i][c], w.o[2 * i][2 + c], w.o[2 * i + 1][c], w.o[2 * i + 1][2 + c]);
    }
  }
}

// out = O v_scale / L, rounded to q's dtype, quantized where asked for: two channels of a column.
__device__ __forceinline__ void store_output(const KvAttentionArgs& a, const KvRow& row, int dim,
                                             int column, int channel, const KvMergedUnit& unit,
                                             float v_scale) {
  if (channel >= dim) return;
  const float factor = unit.total == 0.0f ? 0.0f : __fdividef(v_scale, unit.total);
  const int64_t query_heads = static_cast<int64_t>(a.kv_heads) * a.group;
  const int64_t at =
      ((static_cast<int64_t>(row.b) * a.tokens + row.token(a, column)) * query_heads +
       row.query_head(a, column)) *
          dim +
      channel;
  const uint32_t pair = pack_pair(unit.o.x * factor, unit.o.y * factor, a.q_is_bf16);
  if (a.output_scale == nullptr) {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a.out) + at) = pair;
    return;
  }
  const float inverse = __frcp_rn(*a.output_scale);
  const float2 y = unpack_pair(pair, a.q_is_bf16);
  const auto quantize = [&](float x) {
    return static_cast<int8_t>(
        min(max(__float2int_rn(__fmul_rn(x, inverse)), a.output_qmin), a.output_qmax));
  };
  *reinterpret_cast<char2*>(static_cast<int8_t*>(a.out) + at) =
      make_char2(quantize(y.x), quantize(y.y));
}

inline constexpr int kv_partial_floats(int dim) { return kKvPieceHead + kKvColumns * dim; }

// Merges the warps' pieces; a row that other CTAs share goes to global memory, and the last one of
// them merges those.
template <typename C>
__device__ __forceinline__ void finish_segment(KvWarpState<C>& w, const KvAttentionArgs& a,
                                               const KvSegment& segment, const KvSchedule& schedule,
                                               float* merge, int* last_flag, int warp, int lane) {
  constexpr int kFloats = kv_partial_floats(C::kDim);
  const KvRow row(a, segment);
  const float v_scale = scale_of(a.v_scale, row.head);
  const KvMergeAreaOf<C> area{merge, a.merge_columns};
  const bool whole = segment.first == 0 && segment.last == segment.row_chunks;
  // A CTA has at most one row that began in an earlier CTA and one that goes on in a later one.
  float* const mine =
      a.partials + (2 * static_cast<int64_t>(blockIdx.x) + (segment.first == 0 ? 1 : 0)) * kFloats;
  __syncthreads();  // the merge area is free again
  store_piece<C>(w, area, row.columns, warp, lane);
  __syncthreads();
  for_units<C::kDim, C::kWarps>(row.columns, warp, lane, [&](int, int column, int channel) {
    const KvMergedUnit unit = area.merge(column, channel, channel < C::kDim);
    if (whole) return store_output(a, row, C::kDim, column, channel, unit, v_scale);
    if (channel >= C::kDim) return;
    *reinterpret_cast<float2*>(mine + kKvPieceHead + column * C::kDim + channel) = unit.o;
    if (channel == 0) mine[column] = unit.top, mine[kKvColumns + column] = unit.total;
  });
  if (whole) return;
  int first_cta;
  const int pieces = schedule.pieces(segment, first_cta);
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = a.counters + static_cast<int64_t>(segment.b) * a.rows.rows_per_sequence() +
                   segment.head * a.rows.column_groups + segment.group;
    const bool last = count_arrival(counter) == pieces - 1;
    if (last) *counter = 0;
    *last_flag = last;
  }
  __syncthreads();
  if (!*last_flag) return;
  const float* partials = a.partials + 2 * static_cast<int64_t>(first_cta) * kFloats;
  for_units<C::kDim, C::kWarps>(row.columns, warp, lane, [&](int, int column, int channel) {
    const auto piece = [&](int j) { return partials + (2 * j + (j == 0 ? 1 : 0)) * kFloats; };
    const KvMergedUnit unit = merge_global_pieces(
        piece, pieces, column, kKvPieceHead + column * C::kDim + channel, channel < C::kDim, lane);
    store_output(a, row, C::kDim, column, channel, unit, v_scale);
  });
}

}  // namespace prefixquant
