// SPDX-License-Identifier: Apache-2.0
// The row kernel of hadamard, hadamard_quantize and swiglu_hadamard_quantize: load a block of x (or
// silu(gate) * up) as float32, transform it in L1, then round it to x's dtype or quantize it, with
// the static scale or, once the whole row is there, with its own.
#include "hadamard.h"

#include <type_traits>

#include "exp.h"
#include "quantize_dynamic.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

// silu(gate) * up, float32
template <typename T>
PQ_INLINE void swiglu_row(const T* gate, const T* up, float* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    store(to + c, silu_lanes(load_float(gate + c)) * load_float(up + c));
  }
  if (c < count) {
    store(to + c,
          silu_lanes(load_float_tail(gate + c, count - c)) * load_float_tail(up + c, count - c));
  }
}

template <typename T>
PQ_INLINE void store_row(TransformedBlock from, T* to, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    store_float(to + c, load_float(from.data + c) * from.factor);
  }
  if (c < count) {
    store_float_tail(to + c, load_float_tail(from.data + c, count - c) * from.factor, count - c);
  }
}

}  // namespace

// scratch: 2 * (chunk + 16) floats, where chunk = min(cols, max(block, kRowChunk)); for dynamic
// scales cols + 16 more.
void hadamard_rows(const HadamardRows& p, int64_t row_begin, int64_t row_end, float* scratch) {
  // Without a transform a row still goes through scratch, in pieces that stay in L1.
  const int64_t chunk = p.hadamard.block > 1 ? p.hadamard.block : kRowChunk;
  float* const first = scratch;
  float* const second = scratch + (chunk + 16 - 1) / 16 * 16;
  float* const whole_row = second + (chunk + 16 - 1) / 16 * 16;
  with_float_type(p.x_type, p.x, [&](auto* x) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
    const T* up = static_cast<const T*>(p.up);
    for (int64_t row = row_begin; row < row_end; ++row) {
      for (int64_t c = 0; c < p.cols; c += chunk) {
        const int64_t count = p.cols - c < chunk ? p.cols - c : chunk;
        const int64_t x_offset = row * p.x_stride + c, y_offset = row * p.cols + c;
        if (up) {
          swiglu_row(x + x_offset, up + row * p.up_stride + c, first, count);
        } else {
          load_row(x + x_offset, first, count);
        }
        const TransformedBlock y = p.hadamard.block > 1 ? hadamard_block(first, second, p.hadamard)
                                                        : TransformedBlock{first, 1.0f};
        if (p.row_scale) {
          store_row(y, whole_row + c, count);
        } else if (p.quantized) {
          quantize_block(y, static_cast<int8_t*>(p.y) + y_offset, count, p.quantizer);
        } else {
          store_row(y, static_cast<T*>(p.y) + y_offset, count);
        }
      }
      if (p.row_scale) {
        int8_t* q = static_cast<int8_t*>(p.y) + row * p.cols;
        p.row_scale[row] = quantize_row_dynamic(whole_row, q, p.cols, p.quantizer);
      }
    }
  });
}

PQ_ISA_NAMESPACE_END
