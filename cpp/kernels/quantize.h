// SPDX-License-Identifier: Apache-2.0
// The symmetric static quantizer on lanes and on rows, and the packing of its results to nibbles.
#pragma once

#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

// 1.5 * 2^23: adding it to |v| < 2^22 leaves rint(v), half to even, in the low mantissa bits.
constexpr float kRoundMagic = 12582912.0f;
constexpr int32_t kRoundMagicBits = 0x4B400000;

// q = clamp(rint(x * inv_scale), qmin, qmax). The bounds are integers, so clamping before rounding
// gives the same q and keeps the sum with kRoundMagic in range. A NaN quantizes to 0.
PQ_INLINE Ints<kLanes> quantize_lanes(Floats<kLanes> x, const QuantizerParams& p) {
  Floats<kLanes> v = x * p.inv_scale;
  const Floats<kLanes> zero = {}, low = zero + p.qmin, high = zero + p.qmax;
  v = v < low ? low : v;
  v = v > high ? high : v;
  v = v == v ? v : zero;
  return (Ints<kLanes>)(v + kRoundMagic) - kRoundMagicBits;
}

PQ_INLINE void store_int8(int8_t* to, Ints<kLanes> q) {
  store(to, __builtin_convertvector(q, Bytes<kLanes>));
}

PQ_INLINE void store_int8_tail(int8_t* to, Ints<kLanes> q, int64_t count) {
  int8_t padded[kLanes];
  store_int8(padded, q);
  __builtin_memcpy(to, padded, count);
}

template <typename T>
PQ_INLINE void quantize_row(const T* x, int8_t* q, int64_t count, const QuantizerParams& p) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store_int8(q + c, quantize_lanes(load_float(x + c), p));
  if (c < count) {
    store_int8_tail(q + c, quantize_lanes(load_float_tail(x + c, count - c), p), count - c);
  }
}

// Two int8 values in [-8, 7] -> one byte, the even index in the low nibble; count is even.
PQ_INLINE void pack_row(const int8_t* q, uint8_t* packed, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) {
    packed[i] = static_cast<uint8_t>((q[2 * i] & 0xF) | (q[2 * i + 1] << 4));
  }
}

PQ_INLINE void unpack_row(const uint8_t* packed, int8_t* q, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) {
    q[2 * i] = static_cast<int8_t>(packed[i] << 4) >> 4;
    q[2 * i + 1] = static_cast<int8_t>(packed[i]) >> 4;
  }
}

PQ_ISA_NAMESPACE_END
