// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 to and from float32, round-half-even, one value at a time. The software
// forms give the bits of F16C, NaN payloads included, so every instruction set agrees.
#pragma once

#include <cstdint>

#include "isa_namespace.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

PQ_ISA_NAMESPACE_BEGIN

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline uint32_t float_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

static inline float to_float(float v) { return v; }

static inline float to_float(BFloat16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }

static inline float to_float(Float16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7FFF) << 13;
  if (magnitude >= 0x7C00u << 13) {  // inf, NaN (made quiet, as F16C does)
    const uint32_t quiet = magnitude > 0x7C00u << 13 ? 0x00400000u : 0u;
    return bits_float(sign | 0x7F800000u | magnitude | quiet);
  }
  // Scaling by 2^112 moves the exponent from bias 15 to bias 127 and normalises subnormals exactly.
  const float scaled = bits_float(magnitude) * bits_float((127u + 112u) << 23);
  return bits_float(sign | float_bits(scaled));
#endif
}

static inline void from_float(float v, float* out) { *out = v; }

static inline void from_float(float v, BFloat16* out) {
  const uint32_t bits = float_bits(v);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

static inline void from_float(float v, Float16* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_bits(v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
  } else if (magnitude >=
             0x47800000u) {  // 65536 and above; 65520 .. 65536 overflow by the carry below
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to multiples of 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

PQ_ISA_NAMESPACE_END
