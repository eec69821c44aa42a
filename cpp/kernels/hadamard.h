// SPDX-License-Identifier: Apache-2.0
// Computes y = (H_k (x) H_{2^m}) x / sqrt(2^m k) of one block in place, float32.
//
// Layout: the block is [k, 2^m], k outer. Order of the additions, part of the operation's
// definition: butterflies (a + b, a - b) over the 2^m part with distance h = 1, 2, 4, ..., then for
// each output row i, with s_j = sign[i, j],
//   k <= 60 (and k >= 512): the sum from left to right over g = 0 .. k/4 - 1 of
//     (s_4g x[4g, :] + s_4g+1 x[4g+1, :]) + (s_4g+2 x[4g+2, :] + s_4g+3 x[4g+3, :]),
//     then one multiplication by `norm`;
//   60 < k < 512: integers, whose sums are exact in any order. With M = max |x| over the block and
//     2^(e-1) <= M < 2^e, e at least -90: X = rint(x 2^(22-e)), half to even, S = sum of s_j X_j in
//     int32 (k 2^22 < 2^31), y = float32(S) * (2^(e-22) norm). NaN everywhere where M is not
//     finite.
// A group of four has only 16 values, 8 and their negatives, whatever the number of rows: they are
// formed once and each row picks its own, k/4 additions instead of k. Several butterfly stages are
// done in registers at a time; that changes no operand of any addition.
#pragma once

#include "abs_max.h"
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

// Rows of the sign matrix that are summed together; 4 divides every k > 2.
constexpr int kSignRows = 4;

// Lane i of the result is lane i ^ H of v.
template <int H>
PQ_INLINE Floats<kLanes> swap_lanes(Floats<kLanes> v) {
  Ints<kLanes> index;
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ H;
#if defined(__clang__)
  Floats<kLanes> swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[i ^ H];
  return swapped;
#else
  return __builtin_shuffle(v, index);
#endif
}

// One butterfly stage inside a register: the upper lane of a pair computes a - b as a + (-b), which
// is the same IEEE operation.
template <int H>
PQ_INLINE Floats<kLanes> butterfly_lanes(Floats<kLanes> v) {
#if defined(__AVX512F__)
  // -b as an exact product with -1, fused with the addition: one instruction less.
  Floats<kLanes> factor;
  for (int i = 0; i < kLanes; ++i) factor[i] = (i & H) ? -1.0f : 1.0f;
  return (Floats<kLanes>)_mm512_fmadd_ps((__m512)v, (__m512)factor, (__m512)swap_lanes<H>(v));
#else
  Words<kLanes> sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = (i & H) ? 0x80000000u : 0u;
  return swap_lanes<H>(v) + (Floats<kLanes>)((Words<kLanes>)v ^ sign);
#endif
}

PQ_INLINE Floats<kLanes> butterflies_in_register(Floats<kLanes> v, int64_t pow2) {
  if (pow2 >= 2) v = butterfly_lanes<1>(v);
  if (pow2 >= 4) v = butterfly_lanes<2>(v);
  if (kLanes >= 8 && pow2 >= 8) v = butterfly_lanes<(kLanes >= 8 ? 4 : 1)>(v);
  if (kLanes >= 16 && pow2 >= 16) v = butterfly_lanes<(kLanes >= 16 ? 8 : 1)>(v);
  return v;
}

// COUNT (a power of two) vectors at distance `step`: log2(COUNT) butterfly stages between them.
template <int COUNT>
PQ_INLINE void butterflies_between(Floats<kLanes> (&v)[COUNT]) {
#pragma GCC unroll 8
  for (int h = 1; h < COUNT; h *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
      if (i & h) continue;
      const Floats<kLanes> a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

template <int COUNT>
PQ_INLINE void butterfly_pass(float* x, int64_t total, int64_t step) {
  for (int64_t base = 0; base < total; base += COUNT * step) {
    for (int64_t c = base; c < base + step; c += kLanes) {
      Floats<kLanes> v[COUNT];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) v[i] = load<Floats<kLanes>>(x + c + i * step);
      butterflies_between(v);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) store(x + c + i * step, v[i]);
    }
  }
}

// The first stages of every group of pow2 >= COUNT * kLanes floats, COUNT registers at a time:
// distances 1 .. COUNT * kLanes / 2.
template <int COUNT>
PQ_INLINE void first_pass(float* x, int64_t total) {
  for (int64_t c = 0; c < total; c += COUNT * kLanes) {
    Floats<kLanes> v[COUNT];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
      v[i] = butterflies_in_register(load<Floats<kLanes>>(x + c + i * kLanes), kLanes);
    }
    butterflies_between(v);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) store(x + c + i * kLanes, v[i]);
  }
}

// FWHT of every group of pow2 consecutive floats among `total` (a multiple of pow2; padded to
// kLanes).
PQ_INLINE void fwht(float* x, int64_t total, int64_t pow2) {
  int64_t h;  // the next distance
  if (pow2 >= 8 * kLanes) {
    first_pass<8>(x, total);
    h = 8 * kLanes;
  } else if (pow2 == 4 * kLanes) {
    return first_pass<4>(x, total);
  } else if (pow2 == 2 * kLanes) {
    return first_pass<2>(x, total);
  } else {
    for (int64_t c = 0; pow2 > 1 && c < total; c += kLanes) {
      store(x + c, butterflies_in_register(load<Floats<kLanes>>(x + c), pow2));
    }
    return;
  }
  for (; 8 * h <= pow2; h *= 8) butterfly_pass<8>(x, total, h);
  if (4 * h <= pow2) {
    butterfly_pass<4>(x, total, h);
    h *= 4;
  }
  if (2 * h <= pow2) butterfly_pass<2>(x, total, h);
}

// ---- integers ----

PQ_INLINE bool sums_are_integers(int64_t k) { return k > 60 && k < 512; }

// Turns the block into integers in place; returns what a sum of them is multiplied by.
PQ_INLINE float to_integers(float* x, const HadamardParams& p) {
  constexpr int32_t kInfinity = 0x7F800000;
  const int32_t largest = max_magnitude<int32_t, kLanes>(x, p.block, 0x7FFFFFFF);
  const int32_t e = (largest >> 23) - 126 > -90 ? (largest >> 23) - 126 : -90;
  const float factor = bits_float(static_cast<uint32_t>(127 + 22 - e) << 23);
  // Adding kRoundMagic leaves the integer in the low bits, up to 2^22 itself.
  for (int64_t c = 0; c < p.block; c += kLanes) {
    const Floats<kLanes> v = load<Floats<kLanes>>(x + c) * factor + kRoundMagic;
    store(x + c, (Words<kLanes>)v - static_cast<uint32_t>(kRoundMagicBits));
  }
  if (largest >= kInfinity) return bits_float(0x7FC00000u);
  return bits_float(static_cast<uint32_t>(127 - 22 + e) << 23) * p.norm;
}

// The 16 signed sums of one group of four inputs, in the order of HadamardParams::picks: bit b of
// the index is set where the sign of input b is -1. (a - b) is a + (-b), and the negative of a sum
// is the sum of the negatives, so all are what the definition adds. V: floats, or integers as
// Words, which wrap around where the inputs were not finite.
template <typename V, int W>
PQ_INLINE void signed_sums(const float* x, int64_t pow2, float (*sums)[W]) {
  const auto x0 = load<V>(x), x1 = load<V>(x + pow2);
  const auto x2 = load<V>(x + 2 * pow2), x3 = load<V>(x + 3 * pow2);
  const V low[2] = {x0 + x1, x0 - x1};  // + +, + -
  const V high[2] = {x2 + x3, x2 - x3};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      // Inputs (0, 1) signed (+, -^i), inputs (2, 3) signed (+, -^j) or the opposite.
      const V same = low[i] + high[j], opposite = low[i] - high[j];
      const int first = 2 * i + 8 * j;
      store(sums[first], same);
      store(sums[15 - first], -same);
      store(sums[first ^ 12], opposite);
      store(sums[15 - (first ^ 12)], -opposite);
    }
  }
}

template <int W>
PQ_INLINE Floats<W> finished_sum(Floats<W> sum, float factor) {
  return sum * factor;
}
template <int W>
PQ_INLINE Floats<W> finished_sum(Words<W> sum, float factor) {
  return __builtin_convertvector((Ints<W>)sum, Floats<W>) * factor;
}

// Groups whose sums are formed at a time: 16 of them fill 16 KB of the L1 cache with AVX-512.
constexpr int64_t kGroupsAtATime = 16;

// y[i, 0 .. W) for all rows i of the sign matrix.
template <typename V, int W>
PQ_INLINE void sign_column(const float* x, float* y, const HadamardParams& p, float factor) {
  alignas(64) float sums[kGroupsAtATime * 16][W];
  const int64_t groups = p.k / 4;
  for (int64_t first = 0; first < groups; first += kGroupsAtATime) {
    const int64_t count = groups - first < kGroupsAtATime ? groups - first : kGroupsAtATime;
    for (int64_t g = 0; g < count; ++g) {
      signed_sums<V, W>(x + 4 * (first + g) * p.pow2, p.pow2, sums + 16 * g);
    }
    const bool last = first + count == groups;
    for (int64_t i = 0; i < p.k; i += kSignRows) {
      const uint8_t* picks = p.picks + i * groups + first * kSignRows;
      V acc[kSignRows] = {};
      if (first > 0) {
#pragma GCC unroll 4
        for (int r = 0; r < kSignRows; ++r) acc[r] = load<V>(y + (i + r) * p.pow2);
      }
      for (int64_t g = 0; g < count; ++g) {
#pragma GCC unroll 4
        for (int r = 0; r < kSignRows; ++r) {
          acc[r] = acc[r] + load<V>(sums[16 * g + picks[g * kSignRows + r]]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kSignRows; ++r) {
        if (last) {
          store(y + (i + r) * p.pow2, finished_sum<W>(acc[r], factor));
        } else {
          store(y + (i + r) * p.pow2, acc[r]);
        }
      }
    }
  }
}

template <int W>
PQ_INLINE void sign_pass(float* x, float* y, const HadamardParams& p) {
  if (sums_are_integers(p.k)) {
    const float factor = to_integers(x, p);
    for (int64_t c = 0; c < p.pow2; c += W) sign_column<Words<W>, W>(x + c, y + c, p, factor);
  } else {
    for (int64_t c = 0; c < p.pow2; c += W) sign_column<Floats<W>, W>(x + c, y + c, p, p.norm);
  }
}

// Where a transformed block is and what is left to do: multiply by `factor` (1, which is exact,
// when it is done already).
struct TransformedBlock {
  const float* data;
  float factor;
};

// One block of p.block floats in `x`, padded with anything to a multiple of kLanes. The result is
// in `x` itself when k = 1, otherwise in `y` (as large as x, not overlapping).
PQ_INLINE TransformedBlock hadamard_block(float* x, float* y, const HadamardParams& p) {
  fwht(x, p.block, p.pow2);
  if (p.k == 1) return {x, p.norm};
  if (p.pow2 >= kLanes) {
    sign_pass<kLanes>(x, y, p);
  } else if (p.pow2 == 8) {
    sign_pass<(kLanes > 8 ? 8 : kLanes)>(x, y, p);
  } else if (p.pow2 == 4) {
    sign_pass<4>(x, y, p);
  } else if (p.pow2 == 2) {
    sign_pass<2>(x, y, p);
  } else {
    sign_pass<1>(x, y, p);
  }
  return {y, 1.0f};
}

// y = the finished block less `shift`; y may be where the block is.
PQ_INLINE TransformedBlock subtract_shift(TransformedBlock x, const float* shift, float* y,
                                          int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    store(y + c, load_float(x.data + c) * x.factor - load_float(shift + c));
  }
  for (; c < count; ++c) y[c] = x.data[c] * x.factor - shift[c];
  return {y, 1.0f};
}

PQ_INLINE void quantize_block(TransformedBlock x, int8_t* q, int64_t count, QuantizerParams p) {
  quantize_each(q, count, p, [x](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return (n == kLanes ? load_float(x.data + c) : load_float_tail(x.data + c, n)) * x.factor;
  });
}

PQ_ISA_NAMESPACE_END
