// SPDX-License-Identifier: Apache-2.0
// Units of partial results from CTA to CTA through global memory, each pair of floats in one 8-byte
// word that carries its own mark, the lowest bit of the first float: who finds the mark has the
// pair. One way there, no fence and no counter. The bit costs 2^-23 of one addend.
//
// The words are zero before and after every launch.
#pragma once

#include "prefixquant/kv_attention_merge.cuh"

namespace prefixquant {

using KvMarkedPair = unsigned long long;

inline constexpr int kKvMarkedPairs = 33;  // of a unit: sum and maximum, 64 channels
inline constexpr int kKvMaxRowCtas = 32;   // a lane looks after the sum and maximum of each

__device__ __forceinline__ void store_marked(KvMarkedPair* to, float marked, float other) {
  const uint2 pair{__float_as_uint(marked) | 1u, __float_as_uint(other)};
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to),
               "l"(pair.x | static_cast<KvMarkedPair>(pair.y) << 32)
               : "memory");
}

__device__ __forceinline__ KvMarkedPair load_marked(const KvMarkedPair* from) {
  KvMarkedPair pair;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(pair) : "l"(from) : "memory");
  return pair;
}

__device__ __forceinline__ float2 unmarked(KvMarkedPair pair) {
  return {__uint_as_float(static_cast<uint32_t>(pair) & ~1u),
          __uint_as_float(static_cast<uint32_t>(pair >> 32))};
}

// One warp's result of a unit.
__device__ __forceinline__ void mark_unit(KvMarkedPair* to, const KvMergedUnit& unit, int lane) {
  store_marked(to + 1 + lane, unit.o.x, unit.o.y);
  if (lane == 0) store_marked(to, unit.total, unit.top);
}

// Adds up `count` <= 32 units in their order, of which `unit` is number `own`; leaves the words of
// the others zero.
__device__ __forceinline__ void collect_units(KvMarkedPair* all, KvMergedUnit& unit, int own,
                                              int count, int lane) {
  constexpr int kBatch = 16;
  float2 head = {0.0f, minus_infinity()};
  if (lane == own) {
    head = {unit.total, unit.top};
  } else if (lane < count) {
    KvMarkedPair* const from = all + lane * kKvMarkedPairs;
    KvMarkedPair pair;
    do {
      pair = load_marked(from);
    } while ((pair & 1) == 0);
    *from = 0;
    head = unmarked(pair);
  }
  __syncwarp();
  float top = head.y;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const float factor = exp2_below(head.y, top);
  float total = factor * head.x;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  float2 o = {0.0f, 0.0f};
#pragma unroll 1
  for (int j = 0; j < count; j += kBatch) {
    KvMarkedPair pair[kBatch];
    KvMarkedPair* const from = all + j * kKvMarkedPairs + 1 + lane;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      pair[i] = 1;
      if (j + i < count && j + i != own) pair[i] = load_marked(from + i * kKvMarkedPairs);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      while ((pair[i] & 1) == 0) pair[i] = load_marked(from + i * kKvMarkedPairs);  // seldom
      if (j + i < count && j + i != own) from[i * kKvMarkedPairs] = 0;
      const float2 part = j + i == own ? unit.o : unmarked(pair[i]);
      const float f = __shfl_sync(~0u, factor, (j + i) % 32);
      o.x += f * part.x, o.y += f * part.y;
    }
  }
  unit = {top, total, o};
}

}  // namespace prefixquant
