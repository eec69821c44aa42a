// SPDX-License-Identifier: Apache-2.0
// exp and silu in float32 with one fixed sequence of operations, so that every ISA, the reference
// in tests/reference.py and the CUDA kernels give the same bits.
#pragma once

#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

// exp(x) = 2^n * e^r with n = rint(x / ln 2), r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2].
// ln 2 is split so that n * kLn2High (10 bits) is exact; e^r = 1 + r + r^2 P(r), P of degree 5 (the
// minimax polynomial of Cephes' expf). Error: below 1 ulp (0.97 measured, tests/test_reference.py).
// Overflows to inf above 88.72, underflows gradually to 0 at -104; NaN stays NaN.
PQ_INLINE Floats<kLanes> exp_lanes(Floats<kLanes> x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Floats<kLanes> zero = {}, low = zero - 104.0f, high = zero + 89.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats<kLanes> shifted = x * kLog2E + kRoundMagic;
  const Ints<kLanes> n = (Ints<kLanes>)shifted - kRoundMagicBits;
  const Floats<kLanes> n_float = shifted - kRoundMagic;
  const Floats<kLanes> r = (x - n_float * kLn2High) - n_float * kLn2Low;
  Floats<kLanes> poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  const Floats<kLanes> e_r = (poly * (r * r) + r) + 1.0f;
  // n is -150 .. 128: outside the exponent range of one float32, so 2^n comes in two factors.
  const Ints<kLanes> half = n >> 1;
  const Floats<kLanes> scale0 = (Floats<kLanes>)((half + 127) << 23);
  const Floats<kLanes> scale1 = (Floats<kLanes>)((n - half + 127) << 23);
  return (e_r * scale0) * scale1;
}

// silu(g) = g / (1 + exp(-g))
PQ_INLINE Floats<kLanes> silu_lanes(Floats<kLanes> g) { return g / (exp_lanes(-g) + 1.0f); }

PQ_ISA_NAMESPACE_END
