// SPDX-License-Identifier: Apache-2.0
// One tile of the cache into a warp's softmax state: S^T = K Q^T, online softmax, O^T += V^T P^T.
#pragma once

#include "prefixquant/kv_attention_state.cuh"
#include "prefixquant/mma_f16.cuh"

namespace prefixquant {

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

}  // namespace prefixquant
