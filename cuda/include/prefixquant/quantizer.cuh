// SPDX-License-Identifier: Apache-2.0
//
// The symmetric quantizer on registers: q = clamp(rint(x * inv_scale), qmin, qmax), half to even,
// NaN to 0; the same bits as cpp/kernels/quantize.h. Every float32 operation is written as an
// intrinsic, so that none is contracted into a fused multiply-add.
#pragma once

#include <cstdint>

namespace prefixquant {

struct Quantizer {
  float inv_scale;
  float qmin;
  float qmax;
};

// 1.5 * 2^23: adding it to |v| < 2^22 leaves rint(v) in the low mantissa bits.
inline constexpr float kRoundMagic = 12582912.0f;
inline constexpr uint32_t kRoundMagicBits = 0x4B400000u;
// Set in a NaN, clear in kRoundMagic + level.
inline constexpr uint32_t kNanMark = 0x20000000u;

// The level in the low byte of the result; a NaN leaves kNanMark. The bounds are integers, so
// clamping before rounding gives the same level.
__device__ __forceinline__ uint32_t rounded_bits(float x, const Quantizer& p) {
  float v = __fmul_rn(x, p.inv_scale);
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(p.qmin));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(p.qmax));
  return __float_as_uint(__fadd_rn(v, kRoundMagic));
}

__device__ __forceinline__ int8_t quantize(float x, const Quantizer& p) {
  const uint32_t bits = rounded_bits(x, p);
  return static_cast<int8_t>(bits & kNanMark ? 0u : bits);
}

// The low bytes of four words.
__device__ __forceinline__ uint32_t pack_low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Eight levels as bytes. NaNs are looked for once for all of them: they are rare. kNumbers: no
// x * inv_scale is a NaN.
template <bool kNumbers = false>
__device__ __forceinline__ uint2 quantize8(const float (&x)[8], const Quantizer& p) {
  uint32_t t[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) t[i] = rounded_bits(x[i], p);
  if (!kNumbers && (((t[0] | t[1] | t[2] | t[3]) | (t[4] | t[5] | t[6] | t[7])) & kNanMark)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) t[i] = t[i] & kNanMark ? 0u : t[i];
  }
  return make_uint2(pack_low_bytes(t[0], t[1], t[2], t[3]), pack_low_bytes(t[4], t[5], t[6], t[7]));
}

// A level twice, in 16 bits.
constexpr uint32_t level_pair(float level) {
  return 0x10001u * static_cast<uint16_t>(static_cast<int>(level));
}

// |x * inv_scale| up to which quantize8_bounded can be used.
inline constexpr float kBoundedLevel = 32000.0f;

// quantize8 where every |x * inv_scale| is at most kBoundedLevel: rounded before they are clamped,
// levels are 16 bits, of which one instruction clamps two. qmin, qmax: as level_pair.
__device__ __forceinline__ uint2 quantize8_bounded(const float (&x)[8], float inv_scale,
                                                   uint32_t qmin, uint32_t qmax) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = __fadd_rn(__fmul_rn(x[2 * i], inv_scale), kRoundMagic);
    const float b = __fadd_rn(__fmul_rn(x[2 * i + 1], inv_scale), kRoundMagic);
    const uint32_t pair = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x5410);
    pairs[i] = __vmins2(__vmaxs2(pair, qmin), qmax);
  }
  return make_uint2(__byte_perm(pairs[0], pairs[1], 0x6420),
                    __byte_perm(pairs[2], pairs[3], 0x6420));
}

// Eight levels as nibbles, even index low.
__device__ __forceinline__ uint32_t pack_nibbles(uint2 levels) {
  const uint32_t a = levels.x & 0x0F0F0F0Fu, b = levels.y & 0x0F0F0F0Fu;
  return __byte_perm(a | (a >> 4), b | (b >> 4), 0x6420);
}

// Levels from -2^k to 2^k - 1 without comparisons: |x * inv_scale| 2^-k saturates to [0, 1], which
// also takes a NaN to 0. A power of 2 scales a product without another rounding, unless the factor
// becomes subnormal: exact() says whether the levels are those of a Quantizer.
struct PowerQuantizer {
  float inv_scale;        // |inv_scale| 2^-k
  float size;             // 2^k with the sign of inv_scale
  uint32_t largest_pair;  // 2^k - 1 in both halves
  __device__ __forceinline__ bool exact() const { return inv_scale >= 0x1p-100f; }
};

// unit: 2^-k, or 0 where the bounds are others.
__device__ __forceinline__ PowerQuantizer power_quantizer(const Quantizer& p, float unit) {
  return {fabsf(__fmul_rn(p.inv_scale, unit)), copysignf(p.qmin, p.inv_scale),
          __byte_perm(__float_as_uint(__fadd_rn(p.qmax, kRoundMagic)), 0, 0x1010)};
}

// The level, up to 2^k, in the low half of the result.
__device__ __forceinline__ uint32_t rounded_bits(float x, const PowerQuantizer& p) {
  float part;
  asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(part) : "f"(fabsf(x)), "f"(p.inv_scale));
  const uint32_t sign = __float_as_uint(x) & 0x80000000u;
  const float v = __uint_as_float(__float_as_uint(part) | sign);
  return __float_as_uint(__fmaf_rn(v, p.size, kRoundMagic));
}

// Two levels in the halves of a word.
__device__ __forceinline__ uint32_t quantize2(const float* x, const PowerQuantizer& p) {
  const uint32_t pair = __byte_perm(rounded_bits(x[0], p), rounded_bits(x[1], p), 0x5410);
  return __vmins2(pair, p.largest_pair);
}

// Four levels as bytes.
__device__ __forceinline__ uint32_t quantize4(const float* x, const PowerQuantizer& p) {
  return __byte_perm(quantize2(x, p), quantize2(x + 2, p), 0x6420);
}

// max|y| / qmax of a row, 1 where that is 0; clip is a factor of the maximum.
__device__ __forceinline__ float dynamic_scale(float abs_max, float qmax, float clip) {
  const float scale = __fdiv_rn(__fmul_rn(clip, abs_max), qmax);
  return scale == 0.0f ? 1.0f : scale;
}

}  // namespace prefixquant
