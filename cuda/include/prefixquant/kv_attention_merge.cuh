// SPDX-License-Identifier: Apache-2.0
// Puts partial softmax results together: of the warps of a CTA (shared memory) and of the CTAs that
// share a row (global memory). The order of the additions is that of the pieces, whoever comes
// last.
//
// A piece of `columns` <= 8 columns is, in global memory and in floats: maximum [8] (base 2), sum
// [8], output [8][dimension];
//   M = max_j m_j   L = sum_j 2^(m_j - M) l_j   O = sum_j 2^(m_j - M) o_j
#pragma once

#include <cstdint>

namespace prefixquant {

inline constexpr int kKvColumns = 8;  // columns of a row: the N of the MMA
inline constexpr int kKvPieceHead = 2 * kKvColumns;

__device__ __forceinline__ float exp2_approximate(float x) {  // 2 ulp; 2^-inf = 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ constexpr float minus_infinity() { return -__builtin_inff(); }

// 2^(x - top), 0 for x = -inf whatever top is.
__device__ __forceinline__ float exp2_below(float x, float top) {
  return x == minus_infinity() ? 0.0f : exp2_approximate(x - top);
}

// Adds 1 to a counter; all writes of the CTA before its last barrier are visible to who reads the
// new value, and theirs to this thread.
__device__ __forceinline__ int count_arrival(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;\n"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// A unit is 64 channels of a column: one warp puts it together, a lane has two channels.
inline constexpr int kKvSpan = 64;

__host__ __device__ constexpr int kv_spans(int dim) { return (dim + kKvSpan - 1) / kKvSpan; }

struct KvMergedUnit {
  float top = minus_infinity();  // M
  float total = 0.0f;            // L
  float2 o = {0.0f, 0.0f};       // this lane's channels of O
};

// M and L of kCount pieces, all known to every lane, and the factor of each.
template <int kCount>
__device__ __forceinline__ KvMergedUnit weigh_heads(const float (&top)[kCount],
                                                    const float (&total)[kCount],
                                                    float (&factor)[kCount]) {
  KvMergedUnit merged;
#pragma unroll
  for (int j = 0; j < kCount; ++j) merged.top = fmaxf(merged.top, top[j]);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    factor[j] = exp2_below(top[j], merged.top);
    merged.total += factor[j] * total[j];
  }
  return merged;
}

// Where the warps of a CTA meet, in floats: maxima [8][kWarps], sums [8][kWarps], then the outputs
// of each warp, [columns][kPitch].
template <int kWarps, int kPitch>
struct KvMergeArea {
  static constexpr int kHead = kKvColumns * kWarps;
  float* base;
  int columns;

  static constexpr int floats(int columns) { return 2 * kHead + kWarps * columns * kPitch; }
  __device__ __forceinline__ float* tops(int column) const { return base + column * kWarps; }
  __device__ __forceinline__ float* totals(int column) const { return tops(column) + kHead; }
  __device__ __forceinline__ float* outputs(int warp, int column) const {
    return base + 2 * kHead + (warp * columns + column) * kPitch;
  }
  // A unit of all warps. Every lane computes the factors: cheaper than to hand them around.
  __device__ __forceinline__ KvMergedUnit merge(int column, int channel, bool has_channel) const {
    float top[kWarps], total[kWarps], factor[kWarps];
    float2 part[kWarps];
#pragma unroll
    for (int j = 0; j < kWarps; j += 4) {
      const float4 m = *reinterpret_cast<const float4*>(tops(column) + j);
      const float4 l = *reinterpret_cast<const float4*>(totals(column) + j);
      top[j] = m.x, top[j + 1] = m.y, top[j + 2] = m.z, top[j + 3] = m.w;
      total[j] = l.x, total[j + 1] = l.y, total[j + 2] = l.z, total[j + 3] = l.w;
    }
#pragma unroll
    for (int j = 0; j < kWarps; ++j) {
      part[j] = {0.0f, 0.0f};
      if (has_channel) part[j] = *reinterpret_cast<const float2*>(outputs(j, column) + channel);
    }
    KvMergedUnit merged = weigh_heads(top, total, factor);
#pragma unroll
    for (int j = 0; j < kWarps; ++j) {
      merged.o.x += factor[j] * part[j].x, merged.o.y += factor[j] * part[j].y;
    }
    return merged;
  }
};

// Calls use(unit, column, channel) for every unit; the warps share the work, channel is the lane's.
template <int kDim, int kWarps, typename Use>
__device__ __forceinline__ void for_units(int columns, int warp, int lane, Use&& use) {
  constexpr int kSpans = kv_spans(kDim);
#pragma unroll 1
  for (int unit = warp; unit < columns * kSpans; unit += kWarps) {
    use(unit, unit / kSpans, unit % kSpans * kKvSpan + 2 * lane);
  }
}

// Puts this lane's channels of a unit of `count` pieces in global memory together; piece(j) is the
// address of piece j. All loads of a batch are in flight before the first use: this is latency, not
// bandwidth. Through L2: other SMs have written them.
template <typename Piece>
__device__ __forceinline__ KvMergedUnit merge_global_pieces(Piece&& piece, int count, int column,
                                                            int part_offset, bool has_part,
                                                            int lane) {
  constexpr int kBatch = 16;
  KvMergedUnit merged;
#pragma unroll 1
  for (int j0 = 0; j0 < count; j0 += 32) {
    const int here = min(32, count - j0);
    float m = minus_infinity(), l = 0.0f;
    if (lane < here) {
      const float* from = piece(j0 + lane) + column;
      m = __ldcg(from);
      l = __ldcg(from + kKvColumns);
    }
    float factor = 0.0f;
#pragma unroll 1
    for (int j = 0; j < here; j += kBatch) {
      float2 part[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        part[i] = {0.0f, 0.0f};
        if (j + i < here && has_part) {
          part[i] = __ldcg(reinterpret_cast<const float2*>(piece(j0 + j + i) + part_offset));
        }
      }
      if (j == 0) {
        float fresh = fmaxf(m, merged.top);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
          fresh = fmaxf(fresh, __shfl_xor_sync(~0u, fresh, step));
        }
        const float shrink = exp2_below(merged.top, fresh);
        merged.top = fresh;
        factor = exp2_below(m, fresh);
        merged.total = merged.total * shrink + factor * l;
        merged.o.x *= shrink, merged.o.y *= shrink;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float f = __shfl_sync(~0u, factor, (j + i) % 32);
        merged.o.x += f * part[i].x, merged.o.y += f * part[i].y;
      }
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    merged.total += __shfl_xor_sync(~0u, merged.total, step);
  }
  return merged;
}

}  // namespace prefixquant
