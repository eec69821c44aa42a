// SPDX-License-Identifier: Apache-2.0
//
// The second half of a Hadamard transform on registers: one column of the block [inputs, segment],
// that is the values x[0], x[1], .. at distance `segment`, becomes the outputs y[0], y[1], ..
//
//   SignSums<K, COLUMNS>: y[i] = sum over g of (s_4g x[4g] + s_4g+1 x[4g+1]) + (s_4g+2
//   x[4g+2] + ..),
//     the signs constants. A group has eight sums up to sign: 12 additions a group, then one
//     addition an output and group, K/4 + 3 an element instead of K.
//   Butterflies<F>: the stages of distance 1, 2, .. F/2 (k = 1, blocks longer than a segment).
//
// A thread has kColumns adjacent columns.
#pragma once

#include <cstdint>
#include <utility>

#include "prefixquant/hadamard_signs.h"

namespace prefixquant {

template <int K>
inline constexpr SignMatrix<K> kSignMatrix = sign_matrix<K>();

// The signs of row i in group g: bit b is set where that of input 4g + b is -1.
template <int K>
constexpr int sign_pick(int i, int g) {
  int pick = 0;
  for (int b = 0; b < 4; ++b) pick |= kSignMatrix<K>.minus[i][4 * g + b] ? 1 << b : 0;
  return pick;
}

// acc + the signed sum `PICK` of a group; sums[b1 + 2 b2 + 4 b3] is the one with signs (+, b1, b2,
// b3). The negative of a sum is the sum of the negatives.
template <int PICK, bool FIRST>
__device__ __forceinline__ float add_signed_sum(float acc, const float (&sums)[8]) {
  if constexpr (PICK % 2 == 0) {
    return FIRST ? sums[PICK / 2] : __fadd_rn(acc, sums[PICK / 2]);
  } else {
    return FIRST ? -sums[(15 - PICK) / 2] : __fadd_rn(acc, -sums[(15 - PICK) / 2]);
  }
}

template <int K_, int COLUMNS_>
struct SignSums {
  static constexpr int K = K_;
  static constexpr int kInputs = K_;
  static constexpr int kOutputs = K_;
  static constexpr int kColumns = COLUMNS_;
  static_assert(K_ % 4 == 0, "groups of four inputs");

  template <int G, int... I>
  __device__ __forceinline__ static void add_group(float (&acc)[kOutputs], const float (&sums)[8],
                                                   std::integer_sequence<int, I...>) {
    ((acc[I] = add_signed_sum<sign_pick<K>(I, G), G == 0>(acc[I], sums)), ...);
  }

  // load(n, x): input n of the columns.
  template <int G, typename Load>
  __device__ __forceinline__ static void group(float (&acc)[kColumns][kOutputs], Load& load) {
    float x[4][kColumns];
#pragma unroll
    for (int b = 0; b < 4; ++b) load(4 * G + b, x[b]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float low[2] = {__fadd_rn(x[0][c], x[1][c]), __fsub_rn(x[0][c], x[1][c])};
      const float high[2] = {__fadd_rn(x[2][c], x[3][c]), __fsub_rn(x[2][c], x[3][c])};
      float sums[8];
#pragma unroll
      for (int b1 = 0; b1 < 2; ++b1) {
        sums[b1] = __fadd_rn(low[b1], high[0]);
        sums[b1 + 2] = __fsub_rn(low[b1], high[1]);
        sums[b1 + 4] = __fadd_rn(low[b1], high[1]);
        sums[b1 + 6] = __fsub_rn(low[b1], high[0]);
      }
      add_group<G>(acc[c], sums, std::make_integer_sequence<int, kOutputs>{});
    }
  }

  template <typename Load, int... G>
  __device__ __forceinline__ static void groups(float (&acc)[kColumns][kOutputs], Load& load,
                                                std::integer_sequence<int, G...>) {
    (group<G>(acc, load), ...);
  }

  template <typename Load>
  __device__ __forceinline__ static void sum(float (&acc)[kColumns][kOutputs], Load&& load) {
    groups(acc, load, std::make_integer_sequence<int, K / 4>{});
  }
};

template <int F>
struct Butterflies {
  static constexpr int K = 1;
  static constexpr int kInputs = F;
  static constexpr int kOutputs = F;
  static constexpr int kColumns = F <= 16 ? 2 : 1;

  template <typename Load>
  __device__ __forceinline__ static void sum(float (&acc)[kColumns][kOutputs], Load&& load) {
#pragma unroll
    for (int n = 0; n < F; ++n) {
      float x[kColumns];
      load(n, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) acc[c][n] = x[c];
    }
#pragma unroll
    for (int h = 1; h < F; h *= 2) {
#pragma unroll
      for (int n = 0; n < F; ++n) {
        if (n & h) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float a = acc[c][n], b = acc[c][n + h];
          acc[c][n] = __fadd_rn(a, b);
          acc[c][n + h] = __fsub_rn(a, b);
        }
      }
    }
  }
};

}  // namespace prefixquant
