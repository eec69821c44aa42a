// SPDX-License-Identifier: Apache-2.0
//
// The k x k Hadamard matrices of python/prefixquant/hadamard.py at compile time, by the same
// constructions: Paley I and II over a field of p^e elements, doubling. A kernel whose
// signs are constants adds eight signed sums a group of four inputs instead of multiplying k signs.
// tests/test_hadamard_cuda.py compares every matrix with the Python one.
#pragma once

#include <cstdint>

namespace prefixquant {

// minus[i][j]: the sign of row i, column j is -1.
template <int K>
struct SignMatrix {
  bool minus[K][K] = {};
};

namespace sign_construction {

// chi of the differences of a field of q = p^e elements; element i has the base-p digits of i.
// 1 square, -1 no square, 0 zero.
template <int P, int E>
struct Characters {
  static constexpr int kSize = E == 1 ? P : E == 2 ? P * P : P * P * P;
  int chi[kSize] = {};

  constexpr Characters() {
    for (int i = 1; i < kSize; ++i) chi[i] = -1;
    if constexpr (E == 1) {
      for (int i = 1; i < P; ++i) chi[i * i % P] = 1;
    } else {
      mark_even_powers();
    }
  }

  constexpr int difference(int i, int j) const {
    int result = 0;
    for (int d = 0, weight = 1; d < E; ++d, weight *= P, i /= P, j /= P) {
      result += (i % P - j % P + P) % P * weight;
    }
    return chi[result];
  }

 private:
  // By the first monic polynomial (its low coefficients in lexicographic order) for which the
  // powers of x reach all nonzero elements; the squares are the even powers.
  constexpr void mark_even_powers() {
    for (int code = 0; code < kSize; ++code) {
      int low[E] = {};
      for (int d = 0, rest = code; d < E; ++d, rest /= P) low[E - 1 - d] = rest % P;
      if (order_of_x(low) == kSize - 1) {
        int element[E] = {1};
        for (int n = 0; n < kSize - 1; ++n) {
          chi[index(element)] = n % 2 == 0 ? 1 : -1;
          times_x(element, low);
        }
        return;
      }
    }
  }
  static constexpr int index(const int (&element)[E]) {
    int result = 0;
    for (int d = E - 1; d >= 0; --d) result = result * P + element[d];
    return result;
  }
  static constexpr void times_x(int (&element)[E], const int (&low)[E]) {
    const int top = element[E - 1];
    for (int d = E - 1; d >= 0; --d) {
      element[d] = (((d > 0 ? element[d - 1] : 0) - top * low[d]) % P + P) % P;
    }
  }
  // Powers until 1 or 0 comes back, kSize - 1 for a generator.
  static constexpr int order_of_x(const int (&low)[E]) {
    int element[E] = {1};
    for (int n = 1; n < kSize; ++n) {
      times_x(element, low);
      const int i = index(element);
      if (i == 1) return n;
      if (i == 0) return 0;
    }
    return 0;
  }
};

// Paley I, K = q + 1: [[0, 1..], [-1.., Q]] + I.
template <int P, int E>
constexpr auto paley1() {
  constexpr int kQ = Characters<P, E>::kSize;
  const Characters<P, E> field;
  SignMatrix<kQ + 1> h;
  for (int i = 0; i <= kQ; ++i) {
    for (int j = 0; j <= kQ; ++j) {
      h.minus[i][j] = i == j   ? false
                      : i == 0 ? false
                      : j == 0 ? true
                               : field.difference(i - 1, j - 1) < 0;
    }
  }
  return h;
}

// Paley II, K = 2 (q + 1): C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], C = [[0, 1..],
// [1.., Q]].
template <int P, int E>
constexpr auto paley2() {
  constexpr int kQ = Characters<P, E>::kSize;
  const Characters<P, E> field;
  SignMatrix<2 * (kQ + 1)> h;
  for (int i = 0; i <= kQ; ++i) {
    for (int j = 0; j <= kQ; ++j) {
      const bool minus = i > 0 && j > 0 && field.difference(i - 1, j - 1) < 0;
      for (int a = 0; a < 2; ++a) {
        for (int b = 0; b < 2; ++b) {
          h.minus[2 * i + a][2 * j + b] = i == j ? a + b > 0 : minus != (a + b == 2);
        }
      }
    }
  }
  return h;
}

// [[H, H], [H, -H]]
template <int K>
constexpr SignMatrix<2 * K> doubled(const SignMatrix<K>& half) {
  SignMatrix<2 * K> h;
  for (int i = 0; i < 2 * K; ++i) {
    for (int j = 0; j < 2 * K; ++j) {
      h.minus[i][j] = half.minus[i % K][j % K] != (i >= K && j >= K);
    }
  }
  return h;
}

}  // namespace sign_construction

// The matrix of size K; the sizes below are those with a kernel of their own.
template <int K>
constexpr SignMatrix<K> sign_matrix() {
  namespace c = sign_construction;
  if constexpr (K == 12) return c::paley1<11, 1>();
  if constexpr (K == 20) return c::paley1<19, 1>();
  if constexpr (K == 28) return c::paley1<3, 3>();
  if constexpr (K == 36) return c::paley2<17, 1>();
  if constexpr (K == 40) return c::doubled(c::paley1<19, 1>());
  if constexpr (K == 44) return c::paley1<43, 1>();
  if constexpr (K == 52) return c::paley2<5, 2>();
  if constexpr (K == 60) return c::paley1<59, 1>();
}

}  // namespace prefixquant
