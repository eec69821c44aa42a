// SPDX-License-Identifier: Apache-2.0
// The KV attention kernel's arguments and configuration, and what one warp of it knows: its row,
// its queries as MMA operands, its softmax state, to which the prefix tokens are added here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "prefixquant/kv_attention.h"
#include "prefixquant/kv_attention_merge.cuh"
#include "prefixquant/kv_attention_tile.cuh"
#include "prefixquant/kv_fragments.cuh"
#include "prefixquant/kv_schedule.cuh"

namespace prefixquant {

// The kernel's view of KvAttentionGpuParams.
struct KvAttentionArgs {
  const void* q;
  int64_t q_strides[3];
  bool q_is_bf16;
  KvCacheView cache;
  KvRowShape rows;
  const float* k_scale;
  const float* v_scale;
  const void* prefix_k;
  const void* prefix_v;
  bool prefix_is_bf16;
  int prefix;
  const uint8_t* mask;
  int64_t mask_strides[3];
  int tokens;
  int kv_heads;
  int group;  // query heads of a KV head
  FastDivisor by_group;
  int prefetch_bytes;       // of a CTA before the kernels ahead have finished
  int merge_columns;        // columns that the merge area has room for
  FastDivisor by_row_ctas;  // the CTAs of a row, where their number is fixed
  int cluster_shift;        // log2 of them where they are a cluster, else 0
  float logit_scale;        // scaling * log2(e)
  void* out;
  const float* output_scale;
  int output_qmin;
  int output_qmax;
  int* counters;
  float* partials;
};

template <KvFormat kFormatOf, int kDimOf, int kWarpsOf, int kTokenTiles, int kStagesOf,
          bool kBulkOf>
struct KvAttentionConfig {
  static constexpr KvFormat kFormat = kFormatOf;
  static constexpr int kDim = kDimOf;
  static constexpr int kWarps = kWarpsOf;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kTokenTiles;  // m16 tiles of a warp tile
  static constexpr int kTokens = 16 * kTiles;
  static constexpr int kStages = kStagesOf;
  static constexpr bool kBulk = kBulkOf;
  static constexpr int kRowBytes = kDim * kv_bits(kFormat) / 8;
  static constexpr int kPitch = kDim + 8;  // floats; keeps the lanes' 16-byte stores apart
  using Unpack = KvUnpack<kFormat>;
  using Ring = KvTileRing<kTokens, kRowBytes, kStages, kBulkOf>;
  static_assert(kDim % 32 == 0 && kDim <= 256, "a lane holds D/32 channels of a row");
};

// ---- the state of one warp ----

template <typename C>
struct KvWarpState {
  static constexpr int kSteps = C::kDim / 16;
  uint32_t q[2 * kSteps];  // B operand of S^T: pairs of channels of column g
  float factor[2];         // logit of columns 2t, 2t+1 in base 2, over the MMA's sum
  float top[2];            // maximum so far - kHeadroom
  float total[2];          // this lane's part of the sum of the probabilities
  float o[kSteps][4];      // O^T: channels kDim/8 g + 2 i (0, 1) and + 2 i + 1 (2, 3)
};

// Probabilities are 2^(s - max + kHeadroom) <= 256: float16 keeps eight binades more of the small
// ones normal. The factor cancels in O / L.
inline constexpr float kHeadroom = 8.0f;
inline constexpr float kLazy = 7.0f;

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, bool is_bf16) {
  if (is_bf16) return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, bool is_bf16) {
  if (is_bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float scale_of(const float* scales, int head) {
  return scales != nullptr ? scales[head] : 1.0f;
}

// The row that a segment belongs to, and where its columns are in q and out.
struct KvRow {
  int b, head, first_column, columns;

  __device__ __forceinline__ KvRow(const KvAttentionArgs& a, const KvSegment& s)
      : b(s.b),
        head(s.head),
        first_column(s.group * kKvColumns),
        columns(min(kKvColumns, a.tokens * a.group - first_column)) {}
  __device__ __forceinline__ int token(const KvAttentionArgs& a, int column) const {
    int in_group;
    return a.by_group.divide(first_column + column, in_group);
  }
  __device__ __forceinline__ int query_head(const KvAttentionArgs& a, int column) const {
    int in_group;
    a.by_group.divide(first_column + column, in_group);
    return head * a.group + in_group;
  }
  __device__ __forceinline__ int64_t q_offset(const KvAttentionArgs& a, int column) const {
    return b * a.q_strides[0] + token(a, column) * a.q_strides[1] +
           query_head(a, column) * a.q_strides[2];
  }
};

// Column g of the queries as it lies in memory: channels kDim/4 t .. of it, two to a word.
template <typename C>
struct KvQueries {
  static constexpr int kPerLane = C::kDim / 4;
  uint32_t pair[kPerLane / 2];

  __device__ __forceinline__ KvQueries(const KvAttentionArgs& a, const KvRow& row, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i) pair[i] = 0;
    if (g >= row.columns) return;
    const uint16_t* from = static_cast<const uint16_t*>(a.q) + row.q_offset(a, g) + t * kPerLane;
#pragma unroll
    for (int i = 0; i < kPerLane / 8; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      pair[4 * i] = v.x, pair[4 * i + 1] = v.y, pair[4 * i + 2] = v.z, pair[4 * i + 3] = v.w;
    }
  }
};

// Words of two 16-bit values: lane-wise maximum of the magnitudes (as bits: they are ordered).
__device__ __forceinline__ uint32_t largest_magnitude(uint32_t a, uint32_t b) {
  return __vmaxu2(a & 0x7FFF7FFFu, b & 0x7FFF7FFFu);
}

// Two bfloat16 values as float16 after an exact scaling.
__device__ __forceinline__ uint32_t bf16_pair_to_fp16(uint32_t pair, float scale) {
  const float low = __int_as_float(pair << 16), high = __int_as_float(pair & 0xFFFF0000u);
  return pack_pair(low * scale, high * scale, false);
}

// Float16 operands for an integer cache from bfloat16 queries: each column times the power of two
// that puts its largest value into [256, 512), which is exact. Returns the inverse of the factor.
template <typename C>
__device__ __forceinline__ float scale_bf16_queries(uint32_t (&pair)[C::kDim / 8]) {
  uint32_t both = 0;
#pragma unroll
  for (int i = 0; i < C::kDim / 8; ++i) both = largest_magnitude(both, pair[i]);
  both = largest_magnitude(both, __shfl_xor_sync(~0u, both, 1));
  both = largest_magnitude(both, __shfl_xor_sync(~0u, both, 2));
  const uint32_t largest = max(both & 0xFFFFu, both >> 16);
  // Below 2^-100 all logits are zero to float32 anyway; the clamp keeps 2^(8 - e) finite.
  const int exponent = max(static_cast<int>(largest >> 7) - 127, -100);
  const float scale = __int_as_float((127 + 8 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < C::kDim / 8; ++i) pair[i] = bf16_pair_to_fp16(pair[i], scale);
  return __int_as_float((127 + exponent - 8) << 23);
}

// The queries as B operands, and an empty state. Integer caches run on float16 whatever q is.
template <typename C>
__device__ __forceinline__ void begin_row(KvWarpState<C>& w, const KvQueries<C>& q,
                                          const KvAttentionArgs& a, float k_scale, int lane) {
  using U = typename C::Unpack;
  const int t = lane % 4;
  float scale_back = 1.0f;
  if constexpr (U::kBits == 16) {
#pragma unroll
    for (int i = 0; i < 2 * KvWarpState<C>::kSteps; ++i) w.q[i] = q.pair[i];
  } else {
    uint32_t pair[C::kDim / 8];
#pragma unroll
    for (int i = 0; i < C::kDim / 8; ++i) pair[i] = q.pair[i];
    if (a.q_is_bf16) scale_back = scale_bf16_queries<C>(pair);
#pragma unroll
    for (int i = 0; i < 2 * KvWarpState<C>::kSteps; ++i) {
      const int channel =
          i / U::kPairsPerWord * U::kWordChannels + U::key_channel(i % U::kPairsPerWord);
      const int other = channel + U::kKeyPairStep;
      w.q[i] = __byte_perm(pair[channel / 2], pair[other / 2],
                           (channel % 2 ? 0x32 : 0x10) | (other % 2 ? 0x7600 : 0x5400));
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = 2 * t + c;
    w.factor[c] = a.logit_scale * k_scale * __shfl_sync(~0u, scale_back, 4 * column);
    w.top[c] = minus_infinity();
    w.total[c] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < KvWarpState<C>::kSteps; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) w.o[i][j] = 0.0f;
  }
}

// Raises the maxima to at least `top` and rescales what was summed under the old ones.
template <typename C>
__device__ __forceinline__ void raise_top(KvWarpState<C>& w, const float (&top)[2]) {
  const float fresh[2] = {fmaxf(w.top[0], top[0]), fmaxf(w.top[1], top[1])};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float factor = exp2_below(w.top[c], fresh[c]);
    w.top[c] = fresh[c];
    w.total[c] *= factor;
#pragma unroll
    for (int i = 0; i < KvWarpState<C>::kSteps; ++i) w.o[i][c] *= factor, w.o[i][2 + c] *= factor;
  }
}

// One prefix token: lane (g, t) has a quarter of its key and an eighth of its value.
template <typename C>
struct KvPrefixToken {
  static constexpr int kKeyWords = C::kDim / 8, kValueWords = C::kDim / 16;
  uint32_t key[kKeyWords], value[kValueWords];

  __device__ __forceinline__ void load(const KvAttentionArgs& a, const KvRow& row, int token,
                                       int lane) {
    const int64_t at = (static_cast<int64_t>(row.head) * a.prefix + token) * C::kDim;
    copy_words(key, static_cast<const uint16_t*>(a.prefix_k) + at + lane % 4 * 2 * kKeyWords);
    copy_words(value, static_cast<const uint16_t*>(a.prefix_v) + at + lane / 4 * 2 * kValueWords);
  }

 private:
  template <int kWords>
  __device__ __forceinline__ static void copy_words(uint32_t (&to)[kWords], const uint16_t* from) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const uint2 v = reinterpret_cast<const uint2*>(from)[i];
      to[2 * i] = v.x, to[2 * i + 1] = v.y;
    }
  }
};

// A prefix token into the state, in float32.
template <typename C>
__device__ __forceinline__ void attend_prefix(KvWarpState<C>& w, const KvQueries<C>& q,
                                              const KvPrefixToken<C>& prefix,
                                              const KvAttentionArgs& a, float v_scale, int lane) {
  const int g = lane / 4, t = lane % 4;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < KvPrefixToken<C>::kKeyWords; ++i) {
    const float2 query = unpack_pair(q.pair[i], a.q_is_bf16);
    const float2 key = unpack_pair(prefix.key[i], a.prefix_is_bf16);
    sum += query.x * key.x + query.y * key.y;
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  const float logit[2] = {__shfl_sync(~0u, sum, 8 * t) * a.logit_scale,
                          __shfl_sync(~0u, sum, 8 * t + 4) * a.logit_scale};
  raise_top(w, {logit[0] - kHeadroom, logit[1] - kHeadroom});
  const float inverse = __frcp_rn(v_scale);  // the output is multiplied by v_scale at the end
  const float p[2] = {exp2_approximate(logit[0] - w.top[0]), exp2_approximate(logit[1] - w.top[1])};
  if (g == 0) w.total[0] += p[0], w.total[1] += p[1];
#pragma unroll
  for (int i = 0; i < KvPrefixToken<C>::kValueWords; ++i) {
    const float2 value = unpack_pair(prefix.value[i], a.prefix_is_bf16);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      w.o[i][c] += p[c] * (value.x * inverse);
      w.o[i][2 + c] += p[c] * (value.y * inverse);
    }
  }
}

}  // namespace prefixquant
