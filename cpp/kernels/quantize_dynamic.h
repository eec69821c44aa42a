// SPDX-License-Identifier: Apache-2.0
// The symmetric quantizer with a scale of the row's own.
#pragma once

#include "abs_max.h"
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

// max|x| / qmax, float32; 1 where that is 0 (a row of zeros, or one too small for float32).
PQ_INLINE float dynamic_scale(float abs_max, QuantizerParams p) {
  const float scale = abs_max / p.qmax;
  return scale == 0.0f ? 1.0f : scale;
}

// Quantizes one row and returns its scale.
template <typename T>
PQ_INLINE float quantize_row_dynamic(const T* x, int8_t* q, int64_t count, QuantizerParams p) {
  const float scale = dynamic_scale(abs_max_row(x, count), p);
  p.inv_scale = 1.0f / scale;
  quantize_row(x, q, count, p);
  return scale;
}

PQ_ISA_NAMESPACE_END
