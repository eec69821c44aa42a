// SPDX-License-Identifier: Apache-2.0
// pack_int4 / unpack_int4: the canonical 4-bit layout. Two values a byte, the even index in the low
// nibble, two's complement.
#include "ops.h"

namespace prefixquant {

void pack_int4(const TensorView& q, const TensorView& packed) {
  const ArgumentChecker check{"pack_int4"};
  check.on_cpu(q, "q");
  check.on_cpu(packed, "packed");
  check.dtype(q, "q", DType::kInt8);
  check.dtype(packed, "packed", DType::kUInt8);
  check.contiguous(q, "q");
  check.contiguous(packed, "packed");
  PQ_CHECK(check.op, q.ndim >= 1 && q.size(-1) % 2 == 0,
           "q: expected an even last dimension, got shape ", q.shape_text());
  PQ_CHECK(check.op, packed.numel() * 2 == q.numel(), "packed: expected half the elements of q ",
           q.shape_text(), ", got ", packed.shape_text());

  const int8_t* src = q.data<int8_t>();
  uint8_t* dst = packed.data<uint8_t>();
  const int64_t count = packed.numel();
  bool in_range = true;
#pragma omp parallel for schedule(static) reduction(&& : in_range)
  for (int64_t i = 0; i < count; ++i) {
    const int low = src[2 * i], high = src[2 * i + 1];
    in_range = in_range && low >= -8 && low <= 7 && high >= -8 && high <= 7;
    dst[i] = static_cast<uint8_t>((low & 0xF) | (high & 0xF) << 4);
  }
  PQ_CHECK(check.op, in_range, "q: expected values in [-8, 7]");
}

void unpack_int4(const TensorView& packed, const TensorView& q) {
  const ArgumentChecker check{"unpack_int4"};
  check.on_cpu(packed, "packed");
  check.on_cpu(q, "q");
  check.dtype(packed, "packed", DType::kUInt8);
  check.dtype(q, "q", DType::kInt8);
  check.contiguous(packed, "packed");
  check.contiguous(q, "q");
  PQ_CHECK(check.op, packed.numel() * 2 == q.numel(), "q: expected twice the elements of packed ",
           packed.shape_text(), ", got ", q.shape_text());

  const uint8_t* src = packed.data<uint8_t>();
  int8_t* dst = q.data<int8_t>();
  const int64_t count = packed.numel();
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    dst[2 * i] = static_cast<int8_t>(src[i] << 4) >> 4;  // shift up, then down with sign
    dst[2 * i + 1] = static_cast<int8_t>(src[i]) >> 4;
  }
}

}  // namespace prefixquant
