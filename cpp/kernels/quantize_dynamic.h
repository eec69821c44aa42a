// SPDX-License-Identifier: Apache-2.0
// The symmetric quantizer with a scale of the row's own.
#pragma once

#include "abs_max.h"
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

// clip * max|x| / qmax, two float32 roundings; 1 where that is 0 (a row of zeros, or one too small
// for float32).
PQ_INLINE float dynamic_scale(float abs_max, QuantizerParams p, float clip) {
  const float scale = (clip * abs_max) / p.qmax;
  return scale == 0.0f ? 1.0f : scale;
}

// Quantizes one row and returns its scale.
template <typename T>
PQ_INLINE float quantize_row_dynamic(const T* x, int8_t* q, int64_t count, QuantizerParams p,
                                     float clip = 1.0f) {
  const float scale = dynamic_scale(abs_max_row(x, count), p, clip);
  p.inv_scale = 1.0f / scale;
  quantize_row(x, q, count, p);
  return scale;
}

PQ_ISA_NAMESPACE_END
