// SPDX-License-Identifier: Apache-2.0
// Keys and values: optional Hadamard over the head dimension, optional shift, symmetric quantizer
// with one scale a head, rows written to a packed 4-bit or an int8 cache; and the way back.
#include "hadamard.h"

#include <type_traits>
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN
namespace {

// Walks the rows (b, h, t), t innermost. A division a row would take longer than the row.
struct RowCursor {
  const KvRows& p;
  int64_t b, h, t;
  RowCursor(const KvRows& params, int64_t row)
      : p(params), b(row / (p.heads * p.tokens)), h(row / p.tokens % p.heads), t(row % p.tokens) {}
  int64_t offset(const int64_t (&strides)[3]) const {
    return b * strides[0] + h * strides[1] + t * strides[2];
  }
  void next() {
    if (++t < p.tokens) return;
    t = 0;
    if (++h < p.heads) return;
    h = 0;
    ++b;
  }
};

template <typename T>
PQ_INLINE void dequantize_row(const int8_t* q, float scale, T* y, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    store_float(y + c, __builtin_convertvector(load_widened(q + c), Floats<kLanes>) * scale);
  }
  for (; c < count; ++c) from_float(static_cast<float>(q[c]) * scale, y + c);
}

PQ_INLINE int64_t round_up_16(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace

// scratch: 3 * round_up(dim, 16) floats.
void kv_quantize_rows(const KvRows& p, int64_t row_begin, int64_t row_end, float* scratch) {
  float* const first = scratch;
  float* const second = scratch + round_up_16(p.dim);
  int8_t* const unpacked = reinterpret_cast<int8_t*>(second + round_up_16(p.dim));
  const float qmax = p.bits == 4 ? 7.0f : 127.0f;
  with_float_type(p.x_type, p.x, [&](auto* x) {
    RowCursor at(p, row_begin);
    for (int64_t row = row_begin; row < row_end; ++row, at.next()) {
      const QuantizerParams quantizer{1.0f / p.scale[at.h], -qmax - 1.0f, qmax};
      uint8_t* out = p.q + at.offset(p.q_strides);
      int8_t* q = p.bits == 4 ? unpacked : reinterpret_cast<int8_t*>(out);
      const auto* in = x + at.offset(p.x_strides);
      if (p.hadamard.block > 1 || p.shift) {
        load_row(in, first, p.dim);
        TransformedBlock block{first, 1.0f};
        if (p.hadamard.block > 1) block = hadamard_block(first, second, p.hadamard);
        if (p.shift) block = subtract_shift(block, p.shift + at.h * p.dim, first, p.dim);
        quantize_block(block, q, p.dim, quantizer);
      } else {
        quantize_row(in, q, p.dim, quantizer);
      }
      if (p.bits == 4) pack_row(q, out, p.dim);
    }
  });
}

// y = float(q) * scale[h]; scratch: round_up(dim, 16) bytes.
void kv_dequantize_rows(const KvRows& p, int64_t row_begin, int64_t row_end, float* scratch) {
  int8_t* const unpacked = reinterpret_cast<int8_t*>(scratch);
  with_float_type(p.y_type, p.y, [&](auto* y_const) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(y_const)>>;
    T* y = static_cast<T*>(p.y);
    RowCursor at(p, row_begin);
    for (int64_t row = row_begin; row < row_end; ++row, at.next()) {
      const uint8_t* in = p.q + at.offset(p.q_strides);
      const int8_t* q = reinterpret_cast<const int8_t*>(in);
      if (p.bits == 4) {
        unpack_row(in, unpacked, p.dim);
        q = unpacked;
      }
      dequantize_row(q, p.scale[at.h], y + row * p.dim, p.dim);
    }
  });
}

PQ_ISA_NAMESPACE_END
