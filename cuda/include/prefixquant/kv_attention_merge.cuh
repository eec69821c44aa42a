// SPDX-License-Identifier: Apache-2.0
// Puts partial softmax results together: of the warps of a CTA (shared memory) and of the CTAs that
// share a row (global memory). The order of the additions is that of the pieces, whoever comes
// last.
//
// A piece of `columns` <= 8 columns is, in floats: maximum [8] (base 2), sum [8], output
// [8][pitch];
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

template <bool kGlobal>
__device__ __forceinline__ float load_piece(const float* from) {
  if constexpr (kGlobal) return __ldcg(from);  // written by other SMs: not through L1
  return *from;
}

// kCount consecutive floats of a piece.
template <int kCount>
struct Parts {
  float at[kCount];
  template <bool kGlobal>
  __device__ __forceinline__ static Parts load(const float* from) {
    if constexpr (kCount == 1) {
      return {load_piece<kGlobal>(from)};
    } else {
      const float2* pair = reinterpret_cast<const float2*>(from);
      const float2 v = kGlobal ? __ldcg(pair) : *pair;
      return {v.x, v.y};
    }
  }
};

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

// Calls finish(column, channel, float (&o)[kPerLane], M, L) for every column and channel; the warps
// share the work. piece(j) is the address of piece j. kPerLane consecutive channels a call. All
// loads of a batch are in flight before the first use: this is latency, not bandwidth.
template <int kDim, int kWarps, bool kGlobal, typename Piece, typename Finish>
__device__ __forceinline__ void merge_pieces(Piece&& piece, int pitch, int count, int columns,
                                             int warp, int lane, Finish&& finish) {
  constexpr int kPerLane = kDim % 64 == 0 ? 2 : 1;
  constexpr int kSpans = kDim / (32 * kPerLane);
  constexpr int kBatch = kGlobal ? 16 : 8;
  using Part = Parts<kPerLane>;
  for (int unit = warp; unit < columns * kSpans; unit += kWarps) {
    const int column = unit / kSpans, channel = (unit % kSpans * 32 + lane) * kPerLane;
    const int offset = kKvPieceHead + column * pitch + channel;
    float top = minus_infinity(), total = 0.0f, o[kPerLane] = {};
    for (int j0 = 0; j0 < count; j0 += 32) {
      const int here = min(32, count - j0);
      float m = minus_infinity(), l = 0.0f;
      if (lane < here) {
        const float* from = piece(j0 + lane) + column;
        m = load_piece<kGlobal>(from);
        l = load_piece<kGlobal>(from + kKvColumns);
      }
      float factor = 0.0f;
      for (int j = 0; j < here; j += kBatch) {
        Part part[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          part[i] = Part{};
          if (j + i < here) part[i] = Part::template load<kGlobal>(piece(j0 + j + i) + offset);
        }
        if (j == 0) {
          float fresh = fmaxf(m, top);
#pragma unroll
          for (int step = 16; step > 0; step /= 2) {
            fresh = fmaxf(fresh, __shfl_xor_sync(~0u, fresh, step));
          }
          const float shrink = exp2_below(top, fresh);
          top = fresh;
          factor = exp2_below(m, top);
          total = total * shrink + factor * l;
#pragma unroll
          for (int c = 0; c < kPerLane; ++c) o[c] *= shrink;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float f = __shfl_sync(~0u, factor, (j + i) % 32);
#pragma unroll
          for (int c = 0; c < kPerLane; ++c) o[c] += f * part[i].at[c];
        }
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    finish(column, channel, o, top, total);
  }
}

}  // namespace prefixquant
