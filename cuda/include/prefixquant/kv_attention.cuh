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

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "prefixquant/kv_attention.h"
#include "prefixquant/kv_attention_merge.cuh"
#include "prefixquant/kv_attention_tile.cuh"
#include "prefixquant/kv_fragments.cuh"
#include "prefixquant/kv_schedule.cuh"
#include "prefixquant/mma_f16.cuh"

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
  FastDivide group;    // query heads of a KV head
  int prefetch_bytes;  // of a CTA before the kernels ahead have finished
  int merge_columns;   // columns that the merge area has room for
  float logit_scale;   // scaling * log2(e)
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
        columns(min(kKvColumns, a.tokens * a.group.divisor - first_column)) {}
  __device__ __forceinline__ int token(const KvAttentionArgs& a, int column) const {
    return a.group.divide(first_column + column);
  }
  __device__ __forceinline__ int query_head(const KvAttentionArgs& a, int column) const {
    int in_group;
    a.group.divide(first_column + column, in_group);
    return head * a.group.divisor + in_group;
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

// ---- one tile ----

// S^T of one m16 tile: rows g and g + 8 against columns 2t, 2t + 1.
template <typename C>
__device__ __forceinline__ void score_tile(const KvWarpState<C>& w, const unsigned char* k_rows,
                                           int lane, float (&s)[4]) {
  using U = typename C::Unpack;
  constexpr int kBytes = C::kRowBytes / 4, kWords = kBytes / 4;
  const unsigned char* from = k_rows + lane / 4 * C::kRowBytes + lane % 4 * kBytes;
  uint32_t upper[kWords], lower[kWords];
  load_words<kBytes>(upper, from);
  load_words<kBytes>(lower, from + 8 * C::kRowBytes);
  float odd[4] = {};  // two chains of dependent MMAs
  s[0] = s[1] = s[2] = s[3] = 0.0f;
  uint32_t a[2][2];  // [row][pair of the step]
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    uint32_t upper_pair[U::kPairsPerWord], lower_pair[U::kPairsPerWord];
    U::key_word(upper[i], upper_pair);
    U::key_word(lower[i], lower_pair);
#pragma unroll
    for (int j = 0; j < U::kPairsPerWord; ++j) {
      const int pair = i * U::kPairsPerWord + j;
      a[0][pair % 2] = upper_pair[j], a[1][pair % 2] = lower_pair[j];
      if (pair % 2 == 0) continue;
      if (pair % 4 == 1) {
        mma_m16n8k16<U::kIsBf16>(s, a[0][0], a[1][0], a[0][1], a[1][1], w.q[pair - 1], w.q[pair]);
      } else {
        mma_m16n8k16<U::kIsBf16>(odd, a[0][0], a[1][0], a[0][1], a[1][1], w.q[pair - 1], w.q[pair]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] += odd[i];
}

// O^T += V^T P^T of one m16 tile; `rows` of its 16 tokens exist.
template <typename C>
__device__ __forceinline__ void weigh_tile(KvWarpState<C>& w, const unsigned char* v_rows, int lane,
                                           int rows, uint32_t p0, uint32_t p1) {
  using U = typename C::Unpack;
  constexpr int kBytes = C::kRowBytes / 8, kWords = (kBytes + 3) / 4;
  const int g = lane / 4, t = lane % 4;
  const unsigned char* from = v_rows + 2 * t * C::kRowBytes + g * kBytes;
  uint32_t words[4][kWords];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2 * 8 + i % 2;  // of tokens 2t, 2t + 1, 2t + 8, 2t + 9
    load_words<kBytes>(words[i], from + row * C::kRowBytes);
    // What no copy has written may be NaN, and NaN times a probability of zero is NaN.
    if constexpr (U::kBits == 16) {
      if (rows < 16 && row + 2 * t >= rows) {
#pragma unroll
        for (int j = 0; j < kWords; ++j) words[i][j] = 0;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    uint32_t early[U::kWordChannels], late[U::kWordChannels];
    U::value_word(words[0][j], words[1][j], early);
    U::value_word(words[2][j], words[3][j], late);
#pragma unroll
    for (int c = 0; c < U::kWordChannels; c += 2) {
      const int channel = j * U::kWordChannels + c;
      if (channel < C::kDim / 8) {
        mma_m16n8k16<U::kIsBf16>(w.o[channel / 2], early[c], early[c + 1], late[c], late[c + 1], p0,
                                 p1);
      }
    }
  }
}

// Logits of what a column may not see become -inf. `token` is the first one of the m16 tile.
template <typename C>
__device__ __forceinline__ void hide(const KvAttentionArgs& a, const KvSegment& segment, int token,
                                     int end, int lane, float (&s)[4]) {
  const int g = lane / 4, t = lane % 4;
  unsigned seen = 15;  // bit i for s[i]
  if (a.tokens > 1 || a.mask != nullptr) {
    const KvRow row(a, segment);
#pragma unroll 1  // the rare case: little code rather than little time
    for (int i = 0; i < 4; ++i) {
      const int at = token + g + i / 2 * 8;
      const int query = row.token(a, min(2 * t + i % 2, row.columns - 1));
      bool visible = at < end;
      if (a.mask != nullptr) {
        const int64_t offset =
            row.b * a.mask_strides[0] + query * a.mask_strides[1] + at * a.mask_strides[2];
        visible = visible && a.mask[offset] != 0;
      } else {  // causal, aligned to the lower right
        visible = visible && at < segment.length - (a.tokens - 1) + query;
      }
      if (!visible) seen &= ~(1u << i);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (token + g + i / 2 * 8 >= end || (seen >> i & 1) == 0) s[i] = minus_infinity();
  }
}

// Attends the tile's `end - token` (at most kTokens) rows.
template <typename C>
__device__ __forceinline__ void attend_tile(KvWarpState<C>& w, const KvAttentionArgs& a,
                                            const KvSegment& segment, const unsigned char* k_rows,
                                            const unsigned char* v_rows, int token, int end,
                                            int lane) {
  float s[C::kTiles][4];
  bool all_seen = token + C::kTokens <= end;
  if (a.tokens > 1 || a.mask != nullptr) {
    all_seen =
        all_seen && a.mask == nullptr && token + C::kTokens <= segment.length - (a.tokens - 1);
  }
  float top[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
  for (int m = 0; m < C::kTiles; ++m) {
    score_tile<C>(w, k_rows + m * 16 * C::kRowBytes, lane, s[m]);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[m][i] *= w.factor[i % 2];
    if (!all_seen) hide<C>(a, segment, token + 16 * m, end, lane, s[m]);
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i % 2] = fmaxf(top[i % 2], s[m][i]);
  }
  // Probabilities may grow to 2^kLazy times their bound before the maximum is brought up to date:
  // float16 holds 2^(8 + 7), and after the first tiles it hardly ever happens.
  if (__any_sync(~0u, top[0] > w.top[0] + (kHeadroom + kLazy) ||
                          top[1] > w.top[1] + (kHeadroom + kLazy))) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        top[c] = fmaxf(top[c], __shfl_xor_sync(~0u, top[c], step));
      }
      top[c] -= kHeadroom;
    }
    raise_top(w, top);
  }
  // A column that has seen nothing yet has no maximum to subtract.
  const float below[2] = {w.top[0] == minus_infinity() ? 0.0f : w.top[0],
                          w.top[1] == minus_infinity() ? 0.0f : w.top[1]};
#pragma unroll
  for (int m = 0; m < C::kTiles; ++m) {
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[i] = exp2_approximate(s[m][i] - below[i % 2]);
      w.total[i % 2] += p[i];
    }
    const uint32_t p0 = transpose_8x8_16bit(pack_pair(p[0], p[1], C::Unpack::kIsBf16));
    const uint32_t p1 = transpose_8x8_16bit(pack_pair(p[2], p[3], C::Unpack::kIsBf16));
    weigh_tile<C>(w, v_rows + m * 16 * C::kRowBytes, lane, end - token - 16 * m, p0, p1);
  }
}

// ---- the end of a segment ----

// This warp's piece into the merge area.
template <typename C>
__device__ __forceinline__ void store_piece(KvWarpState<C>& w, float* piece, int columns,
                                            int lane) {
  constexpr int kPerGroup = C::kDim / 8;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      w.total[c] += __shfl_xor_sync(~0u, w.total[c], step);
    }
    const int column = 2 * t + c;
    if (column >= columns) continue;
    if (g == 0) piece[column] = w.top[c], piece[kKvColumns + column] = w.total[c];
    float* to = piece + kKvPieceHead + column * C::kPitch + g * kPerGroup;
#pragma unroll
    for (int i = 0; i < kPerGroup / 4; ++i) {
      *reinterpret_cast<float4*>(to + 4 * i) =
          make_float4(w.o[2 * i][c], w.o[2 * i][2 + c], w.o[2 * i + 1][c], w.o[2 * i + 1][2 + c]);
    }
  }
}

// out = O v_scale / L, rounded to q's dtype, quantized where asked for.
template <int kPerLane>
__device__ __forceinline__ void store_output(const KvAttentionArgs& a, const KvRow& row, int dim,
                                             int column, int channel, const float (&o)[kPerLane],
                                             float total, float v_scale) {
  const float factor = total == 0.0f ? 0.0f : v_scale / total;
  const int64_t query_heads = static_cast<int64_t>(a.kv_heads) * a.group.divisor;
  const int64_t at =
      ((static_cast<int64_t>(row.b) * a.tokens + row.token(a, column)) * query_heads +
       row.query_head(a, column)) *
          dim +
      channel;
  const uint32_t pair =
      pack_pair(o[0] * factor, kPerLane == 2 ? o[kPerLane - 1] * factor : 0.0f, a.q_is_bf16);
  if (a.output_scale == nullptr) {
    uint16_t* to = static_cast<uint16_t*>(a.out) + at;
    if constexpr (kPerLane == 2) {
      *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      *to = static_cast<uint16_t>(pair);
    }
    return;
  }
  const float inverse = __frcp_rn(*a.output_scale);
  const float2 y = unpack_pair(pair, a.q_is_bf16);
  const auto quantize = [&](float x) {
    return min(max(__float2int_rn(__fmul_rn(x, inverse)), a.output_qmin), a.output_qmax);
  };
  int8_t* to = static_cast<int8_t*>(a.out) + at;
  to[0] = static_cast<int8_t>(quantize(y.x));
  if constexpr (kPerLane == 2) to[1] = static_cast<int8_t>(quantize(y.y));
}

template <int kPerLane>
__device__ __forceinline__ void store_partial(float* to, const float (&o)[kPerLane]) {
  if constexpr (kPerLane == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(o[0], o[1]);
  } else {
    to[0] = o[0];
  }
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
  const int stride = kKvPieceHead + a.merge_columns * C::kPitch;
  const bool whole = segment.first == 0 && segment.last == segment.row_chunks;
  // A CTA has at most one row that began in an earlier CTA and one that goes on in a later one.
  float* const mine =
      a.partials + (2 * static_cast<int64_t>(blockIdx.x) + (segment.first == 0 ? 1 : 0)) * kFloats;
  __syncthreads();  // the merge area is free again
  store_piece<C>(w, merge + warp * stride, row.columns, lane);
  __syncthreads();
  merge_pieces<C::kDim, C::kWarps, false>(
      [&](int j) { return merge + j * stride; }, C::kPitch, C::kWarps, row.columns, warp, lane,
      [&](int column, int channel, const auto& o, float top, float total) {
        if (whole) return store_output(a, row, C::kDim, column, channel, o, total, v_scale);
        store_partial(mine + kKvPieceHead + column * C::kDim + channel, o);
        if (channel == 0) mine[column] = top, mine[kKvColumns + column] = total;
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
  merge_pieces<C::kDim, C::kWarps, true>(
      [&](int j) { return partials + (2 * j + (j == 0 ? 1 : 0)) * kFloats; }, C::kDim, pieces,
      row.columns, warp, lane,
      [&](int column, int channel, const auto& o, float, float total) {
        store_output(a, row, C::kDim, column, channel, o, total, v_scale);
      });
}

// Starts bringing the first rows of a segment from memory to L2. Run before the kernels ahead in
// the stream have finished, so all it reads may be old: it is a hint, and reads through L2 only.
template <typename C>
__device__ __forceinline__ void prefetch_segment(const KvAttentionArgs& a, const KvSegment& s,
                                                 int warp, int lane) {
#if __CUDA_ARCH__ >= 900
  const int begin = s.token_begin(a.rows);
  const int rows = min(s.token_end(a.rows) - begin, a.prefetch_bytes / (2 * C::kRowBytes));
  const int step = a.cache.run;
#pragma unroll 1
  for (int row = (warp * 32 + lane) * step; row < rows; row += C::kThreads * step) {
    int page = s.b, in_page = begin + row;
    if (a.cache.block_table != nullptr) {
      const int entry = a.cache.page_size.divide(begin + row, in_page);
      page = __ldcg(a.cache.block_table + s.b * a.cache.block_table_stride + entry);
      if (page < 0 || page >= a.cache.pages) continue;
    }
    const int bytes = min(step, rows - row) * C::kRowBytes;
    const int64_t in_head = static_cast<int64_t>(in_page) * C::kRowBytes;
    prefetch_l2(a.cache.k + page * a.cache.k_page_stride + s.head * a.cache.k_head_stride + in_head,
                bytes);
    prefetch_l2(a.cache.v + page * a.cache.v_page_stride + s.head * a.cache.v_head_stride + in_head,
                bytes);
  }
#endif
}

// What a warp needs seldom: in shared memory, because registers decide how many CTAs an SM holds.
struct alignas(16) KvWarpPlan {
  KvSegment segment;  // being attended
  KvSegment ahead;    // being copied
  KvSchedule schedule;
};

template <typename C>
inline int kv_attention_smem_bytes(int merge_columns) {
  const int piece = (kKvPieceHead + merge_columns * C::kPitch) * 4;
  const int plan = static_cast<int>(sizeof(KvWarpPlan));
  return C::kWarps * (C::Ring::kBytes + 8 * C::kStages + plan + piece) + 16;
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
__device__ __forceinline__ bool plan_warp(const KvAttentionArgs& a, KvWarpPlan& plan, int warp,
                                          int lane) {
  KvSchedule schedule;
  KvSegment segment;
#pragma unroll 1
  for (bool early = true;; early = false) {
    const int planned = lane_length(a.rows, lane);
    segment = kv_first_segment(a.rows, schedule, planned, lane);
    if (!early) break;
    if (segment.remaining >= 0) prefetch_segment<C>(a, segment, warp, lane);
    grid_dependency_wait();
    const bool same = a.rows.batch <= 32 && lane_length(a.rows, lane) == planned;
    if (__all_sync(~0u, same)) break;
  }
  keep(plan, {segment, segment, schedule}, lane);
  return segment.remaining >= 0;
}

// An empty state for the segment's row; the prefix tokens go with its first chunk.
template <typename C>
__device__ __forceinline__ void begin_segment(KvWarpState<C>& state, const KvAttentionArgs& a,
                                              const KvSegment& segment, int warp, int lane) {
  const KvRow row(a, segment);
  const bool has_prefix = segment.first == 0 && warp < a.prefix;
  KvPrefixToken<C> prefix;
  if (has_prefix) prefix.load(a, row, warp, lane);
  const float v_scale = scale_of(a.v_scale, row.head);
  const KvQueries<C> queries(a, row, lane);
  begin_row<C>(state, queries, a, scale_of(a.k_scale, row.head), lane);
  if (!has_prefix) return;
#pragma unroll 1
  for (int token = warp;;) {
    attend_prefix<C>(state, queries, prefix, a, v_scale, lane);
    token += C::kWarps;
    if (token >= a.prefix) break;
    prefix.load(a, row, token, lane);
  }
}

template <typename C>
__device__ __forceinline__ void attend_cta(const KvAttentionArgs& a, unsigned char* smem) {
  using Ring = typename C::Ring;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(smem + C::kWarps * Ring::kBytes);
  KvWarpPlan& plan = reinterpret_cast<KvWarpPlan*>(barriers + C::kWarps * C::kStages)[warp];
  float* const merge = reinterpret_cast<float*>(barriers + C::kWarps * C::kStages) +
                       C::kWarps * (sizeof(KvWarpPlan) / 4);
  int* const last_flag =
      reinterpret_cast<int*>(merge + C::kWarps * (kKvPieceHead + a.merge_columns * C::kPitch));
  Ring ring(smem + warp * Ring::kBytes, barriers + warp * C::kStages, lane);
  if (!plan_warp<C>(a, plan, warp, lane)) return;

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
    begin_segment<C>(state, a, plan.segment, warp, lane);
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
