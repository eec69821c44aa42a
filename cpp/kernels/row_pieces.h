// SPDX-License-Identifier: Apache-2.0
// A row in pieces of kLanes, the last one shorter, and vectors [cols] beside rows.
#pragma once

#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

// fn(c, n) for every piece of a row: n = kLanes except for the last, shorter one.
template <typename Fn>
PQ_INLINE void for_pieces(int64_t cols, Fn&& fn) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) fn(c, kLanes);
  if (c < cols) fn(c, cols - c);
}

template <typename T>
PQ_INLINE Floats<kLanes> load_piece(const T* from, int64_t n) {
  return n == kLanes ? load_float(from) : load_float_tail(from, n);
}

template <typename T>
PQ_INLINE void store_piece(T* to, Floats<kLanes> value, int64_t n) {
  if (n == kLanes) {
    store_float(to, value);
  } else {
    store_float_tail(to, value, n);
  }
}

// The vector in float32, where it is or in `scratch` [cols]; null where it is absent. One type for
// all rows, so that a kernel needs no third type beside those of x and weight.
PQ_INLINE const float* float_channels(ChannelVector channels, int64_t cols, float* scratch) {
  const auto [data, type] = channels;
  if (!data || type == FloatType::kFloat32) return static_cast<const float*>(data);
  with_float_type(type, data, [&](auto* values) { load_row(values, scratch, cols); });
  return scratch;
}

// q[c] = quantize(normalized(c, n) - shift[c]) in pieces; no shift: quantize(normalized(c, n)).
template <typename Normalized>
PQ_INLINE void shift_quantize(int8_t* q, const float* shift, int64_t cols,
                              QuantizerParams quantizer, Normalized&& normalized) {
  if (!shift) return quantize_each(q, cols, quantizer, normalized);
  quantize_each(q, cols, quantizer, [=](int64_t c, int64_t n) PQ_INLINE_LAMBDA {
    return normalized(c, n) - load_piece(shift + c, n);
  });
}

PQ_ISA_NAMESPACE_END
