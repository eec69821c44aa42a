// SPDX-License-Identifier: Apache-2.0
// How the CTAs of the KV attention kernel share ragged sequences: decided on the device, so that
// the grid depends on nothing that only the device knows.
//
// A row is (sequence, KV head, group of 8 columns); its cache is cut into chunks of tokens, at
// least one. A CTA's part of a row is a segment; the segments of a row are put together by the last
// CTA to arrive. Two ways:
//   one segment a CTA   the least segment length for which the segments are no more than the CTAs
//   one line            the chunks of all rows stand in a line, cut evenly: CTA i of n takes
//                       [i N / n, (i + 1) N / n), which may be several rows and parts of two more
// The first has nothing to switch in the middle (a switch costs about what 512 tokens cost: the
// pipeline runs dry while the warps merge), the second has no leftovers; the shorter one is taken.
#pragma once

#include <cstdint>

#include "prefixquant/fast_divisor.h"

namespace prefixquant {

struct KvRowShape {
  const int32_t* lengths;  // [batch] or nullptr
  int max_length;
  int batch;
  int kv_heads;
  int column_groups;
  int chunk_shift;        // log2 of the tokens of a chunk
  int least_chunks;       // of a segment of the first way: shorter ones do not fill the warps
  int switch_chunks;      // what the switch from row to row costs
  FastDivisor by_groups;  // column_groups

  __device__ __forceinline__ int rows_per_sequence() const { return kv_heads * column_groups; }
};

__device__ __forceinline__ int kv_length(const KvRowShape& shape, int b) {
  if (shape.lengths == nullptr) return shape.max_length;
  // Through L2: this SM may have read it before it was final (prefetch_segment).
  return min(max(__ldcg(shape.lengths + b), 0), shape.max_length);
}

__device__ __forceinline__ int kv_chunks(const KvRowShape& shape, int length) {
  return max(1, (length + (1 << shape.chunk_shift) - 1) >> shape.chunk_shift);
}

// A segment, and where the CTA goes after it.
struct KvSegment {
  int b, head, group;  // sequence, KV head, group of columns
  int length;          // tokens of the sequence
  int row_chunks;      // chunks of the row
  int first, last;     // chunks [first, last) of the row
  int remaining;       // chunks of this CTA after this segment; -1: it has no segment at all
  int row_begin;       // one line: the chunk in the line at which the row begins

  __device__ __forceinline__ int token_begin(const KvRowShape& shape) const {
    return first << shape.chunk_shift;
  }
  __device__ __forceinline__ int token_end(const KvRowShape& shape) const {
    return min(length, last << shape.chunk_shift);
  }
  __device__ __forceinline__ void next(const KvRowShape& shape) {
    row_begin += row_chunks;
    if (++group == shape.column_groups) {
      group = 0;
      if (++head == shape.kv_heads) {
        head = 0;
        length = kv_length(shape, ++b);
        row_chunks = kv_chunks(shape, length);
      }
    }
    first = 0;
    last = min(row_chunks, remaining);
    remaining -= last;
  }
};

struct KvSchedule {
  int total;  // chunks of all rows
  int ctas;   // one line: CTAs that have work, at most `total`
  int split;  // one segment a CTA: its chunks at most; 0: one line

  // floor(total cta / ctas) in 32 bits.
  __device__ __forceinline__ int begin_of(int cta) const {
    const int each = total / ctas;
    return each * cta + (total - each * ctas) * cta / ctas;
  }
  // The CTA that works on chunk x: the last i with begin_of(i) <= x.
  __device__ __forceinline__ int cta_of(int x) const {
    int i = static_cast<int>(static_cast<float>(x) * ctas / total);  // off by one at most
#pragma unroll 1
    while (i > 0 && begin_of(i) > x) --i;
#pragma unroll 1
    while (i + 1 < ctas && begin_of(i + 1) <= x) ++i;
    return i;
  }
  // The number of segments of a segment's row, and the CTA of the first one.
  __device__ __forceinline__ int pieces(const KvSegment& s, int& first_cta) const {
    if (split > 0) {
      const int count = (s.row_chunks + split - 1) / split;
      // Segment j begins at chunk j row_chunks / count; see kv_first_segment.
      first_cta =
          static_cast<int>(blockIdx.x) - (s.first * count + s.row_chunks - 1) / s.row_chunks;
      return count;
    }
    int ends[2] = {s.row_begin, s.row_begin + s.row_chunks - 1};
#pragma unroll 1
    for (int i = 0; i < 2; ++i) ends[i] = cta_of(ends[i]);
    first_cta = ends[0];
    return ends[1] - ends[0] + 1;
  }
};

__device__ __forceinline__ int warp_inclusive_sum(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Sum over all sequences of count(chunks of a row) times the rows of a sequence.
template <typename Count>
__device__ __forceinline__ int sum_over_rows(const KvRowShape& shape, int lane_chunks, int lane,
                                             Count&& count) {
  int sum = lane < shape.batch ? count(lane_chunks) : 0;
#pragma unroll 1
  for (int b = 32 + lane; b < shape.batch; b += 32) {
    sum += count(kv_chunks(shape, kv_length(shape, b)));
  }
  return __reduce_add_sync(~0u, sum) * shape.rows_per_sequence();
}

// The least segment length in chunks, or 0 where one line is quicker. lane_chunks: of sequence
// `lane`.
__device__ __forceinline__ int choose_split(const KvRowShape& shape, int total, int longest,
                                            int lane_chunks, int lane) {
  const int rows = shape.batch * shape.rows_per_sequence(), ctas = gridDim.x;
  if (rows > ctas) return 0;
  const int per_row = ctas / rows;
  int low = max((total + ctas - 1) / ctas, shape.least_chunks);
  int high = max((longest + per_row - 1) / per_row, low);  // always possible
#pragma unroll 1
  for (int i = 0; i < 5 && low < high; ++i) {
    const int middle = (low + high) / 2;
    const int segments = sum_over_rows(shape, lane_chunks, lane,
                                       [&](int chunks) { return (chunks + middle - 1) / middle; });
    if (segments <= ctas) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int even = max(total / ctas, shape.least_chunks);
  return high <= even + shape.switch_chunks ? high : 0;
}

// The length of sequence `lane`.
__device__ __forceinline__ int lane_length(const KvRowShape& shape, int lane) {
  return lane < shape.batch ? kv_length(shape, lane) : 0;
}

// Run by every warp alike: the first segment of this CTA. `length` is lane_length().
__device__ __forceinline__ KvSegment kv_first_segment(const KvRowShape& shape, KvSchedule& schedule,
                                                      int length, int lane) {
  const int lane_chunks = lane < shape.batch ? kv_chunks(shape, length) : 0;
  int longest = lane_chunks;
#pragma unroll 1
  for (int b = 32 + lane; b < shape.batch; b += 32) {
    longest = max(longest, kv_chunks(shape, kv_length(shape, b)));
  }
  longest = __reduce_max_sync(~0u, longest);
  const int total = sum_over_rows(shape, lane_chunks, lane, [](int chunks) { return chunks; });
  const int split = choose_split(shape, total, longest, lane_chunks, lane);
  schedule = {total, min(total, static_cast<int>(gridDim.x)), split};

  KvSegment s{};
  s.remaining = -1;
  const int cta = blockIdx.x;
  if (split == 0 && cta >= schedule.ctas) return s;
  // The place of this CTA in a line of units: segments, or chunks.
  const int begin = split > 0 ? cta : schedule.begin_of(cta);
  const int end = split > 0 ? cta + 1 : schedule.begin_of(cta + 1);
  const auto units_of = [&](int chunks) {
    return split > 0 ? (chunks + split - 1) / split : chunks;
  };
  int before = 0, row_units = 0;  // units of the sequences before s.b; of a row of s.b
  bool found = false;
#pragma unroll 1
  for (int b = 0; b < shape.batch && !found; b += 32) {
    int chunks = lane_chunks;
    if (b > 0) chunks = b + lane < shape.batch ? kv_chunks(shape, kv_length(shape, b + lane)) : 0;
    const int units = b + lane < shape.batch ? units_of(chunks) : 0;
    const int mine = units * shape.rows_per_sequence();
    const int upto = before + warp_inclusive_sum(mine, lane);
    const unsigned behind = __ballot_sync(~0u, upto > begin);
    found = behind != 0;
    const int source = found ? __ffs(behind) - 1 : 31;
    before = __shfl_sync(~0u, found ? upto - mine : upto, source);
    s.b = b + source;
    s.row_chunks = __shfl_sync(~0u, chunks, source);
    s.length = __shfl_sync(~0u, b == 0 ? length : kv_length(shape, min(b + lane, shape.batch - 1)),
                           source);
    row_units = __shfl_sync(~0u, units, source);
  }
  if (!found) return s;  // more CTAs than segments
  const int row = (begin - before) / row_units, unit = begin - before - row * row_units;
  s.head = shape.by_groups.divide(row, s.group);
  if (split > 0) {
    s.first = unit * s.row_chunks / row_units;
    s.last = (unit + 1) * s.row_chunks / row_units;
    s.remaining = 0;
  } else {
    s.row_begin = begin - unit;
    s.first = unit;
    s.last = min(s.row_chunks, unit + end - begin);
    s.remaining = end - begin - (s.last - s.first);
  }
  return s;
}

}  // namespace prefixquant
