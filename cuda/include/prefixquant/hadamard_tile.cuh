// SPDX-License-Identifier: Apache-2.0
//
// The first half of a Hadamard transform on registers: a warp loads tiles of 256 kVectors elements,
// applies SwiGLU, and the butterflies of distances 1, 2, 4 (inside a lane's vector of 8), 8 .. 128
// (between lanes) and 256, 512 (between a lane's vectors). In the upper lane of a pair, a - b is
// fma(b, -1, a), the same rounding.
#pragma once

#include <cstdint>

#include "prefixquant/row_vector.cuh"

namespace prefixquant {

// The longest part of a block that is transformed in one warp's registers.
inline constexpr int kMaxSegment = 1024;

// g / (1 + exp(-g)) within 4 ulp; exp(-g) = inf gives -0, NaN stays NaN.
__device__ __forceinline__ float silu_approximate(float g) {
  constexpr float kMinusLog2E = -1.44269504088896341f;
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(g, kMinusLog2E)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(__fadd_rn(1.0f, e)));
  return __fmul_rn(g, r);
}

// Eight elements of a 16-bit type that is known at run time.
__device__ __forceinline__ void to_floats(const uint4& raw, bool is_bfloat16, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  if (is_bfloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_pair(words[i], __nv_bfloat16{}, v[2 * i], v[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_pair(words[i], __half{}, v[2 * i], v[2 * i + 1]);
  }
}

template <int DISTANCE>
__device__ __forceinline__ void butterflies_in_vector(float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i & DISTANCE) continue;
    const float a = v[i], b = v[i + DISTANCE];
    v[i] = __fadd_rn(a, b);
    v[i + DISTANCE] = __fsub_rn(a, b);
  }
}

// Distance 8 * LANES elements.
template <int LANES, int kVectors>
__device__ __forceinline__ void butterflies_between_lanes(float (&v)[kVectors][8], int lane) {
  const float sign = lane & LANES ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      v[i][e] = __fmaf_rn(v[i][e], sign, __shfl_xor_sync(0xFFFFFFFFu, v[i][e], LANES));
    }
  }
}

// All distances of groups of kGroup elements, 8 a lane, with half of the shuffles: of two values
// one stays and the other is exchanged, so that each lane has the operands of a butterfly. The
// stage before says which: it is fma(b, s, a) and fma(b, -s, a), s by the lane. So lanes take the
// places of elements: v[..][4 h + e] becomes element kGroup / 2 h + 4 (lane of the group) + e. The
// upper lane of a pair has b - a instead of a - b, the same rounding: see exchanged_sign.
template <int kGroup, int kVectors>
__device__ __forceinline__ void exchange_butterflies(float (&v)[kVectors][8], int lane) {
  static_assert(kGroup >= 16 && kGroup <= 256, "lanes of one warp");
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    butterflies_in_vector<1>(v[i]);
    butterflies_in_vector<2>(v[i]);
  }
#pragma unroll
  for (int lanes = 1; lanes <= kGroup / 8; lanes *= 2) {
    const bool last = lanes == kGroup / 8;
    const float sign = !last && (lane & lanes) ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float a = v[i][e], b = v[i][e + 4];
        v[i][e] = __fmaf_rn(b, sign, a);
        v[i][e + 4] = __fmaf_rn(b, -sign, a);
        if (!last) v[i][e + 4] = __shfl_xor_sync(0xFFFFFFFFu, v[i][e + 4], lanes);
      }
    }
  }
}

// The sign bit of what v[..][4 half + e] is multiplied by. The differences of stage 2^i are
// negative in lanes with bit i, and go on to lanes with bit i + 1; those of the last stage stay.
template <int kGroup>
__device__ __forceinline__ uint32_t exchanged_sign(int lane, int half) {
  constexpr int kLast = kGroup / 16;  // bit of the last stage
  const int negative = lane & ((lane >> 1 & (kLast - 1)) | (half == 1 ? kLast : 0));
  return static_cast<uint32_t>(__popc(negative)) << 31;
}

// Distance 256 * VECTORS elements.
template <int VECTORS, int kVectors>
__device__ __forceinline__ void butterflies_between_vectors(float (&v)[kVectors][8]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i & VECTORS) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float a = v[i][e], b = v[i + VECTORS][e];
      v[i][e] = __fadd_rn(a, b);
      v[i + VECTORS][e] = __fsub_rn(a, b);
    }
  }
}

// All stages of groups of `segment` elements (a power of two up to 256 kVectors), all lanes
// together. Vector i of a lane holds the elements 8 (32 i + lane) .. + 7 of the tile. kSegment: the
// segment where it is known, so that there are no branches between the stages; 0 where it is not.
template <int kSegment, int kVectors>
__device__ __forceinline__ void transform_tile(float (&v)[kVectors][8], int segment, int lane) {
  if constexpr (kSegment > 0) segment = kSegment;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (segment >= 2) butterflies_in_vector<1>(v[i]);
    if (segment >= 4) butterflies_in_vector<2>(v[i]);
    if (segment >= 8) butterflies_in_vector<4>(v[i]);
  }
  if (segment >= 16) butterflies_between_lanes<1>(v, lane);
  if (segment >= 32) butterflies_between_lanes<2>(v, lane);
  if (segment >= 64) butterflies_between_lanes<4>(v, lane);
  if (segment >= 128) butterflies_between_lanes<8>(v, lane);
  if (segment >= 256) butterflies_between_lanes<16>(v, lane);
  if constexpr (kVectors >= 2) {
    if (segment >= 512) butterflies_between_vectors<1>(v);
  }
  if constexpr (kVectors >= 4) {
    if (segment >= 1024) butterflies_between_vectors<2>(v);
  }
}

// Vectors of x and, with SwiGLU, of up, as they lie in memory.
template <bool kSwiglu, int kVectors>
struct RawTile {
  uint4 x[kVectors];
  uint4 up[kVectors];

  __device__ __forceinline__ void load(int i, const uint16_t* x_from, const uint16_t* up_from) {
    x[i] = *reinterpret_cast<const uint4*>(x_from);
    if constexpr (kSwiglu) up[i] = *reinterpret_cast<const uint4*>(up_from);
  }
  __device__ __forceinline__ void clear(int i) { x[i] = up[i] = make_uint4(0, 0, 0, 0); }

  // float32(x), or silu(x) * up
  __device__ __forceinline__ void values(bool is_bfloat16, float (&v)[kVectors][8]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      to_floats(x[i], is_bfloat16, v[i]);
      if constexpr (kSwiglu) {
        float u[8];
        to_floats(up[i], is_bfloat16, u);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[i][e] = __fmul_rn(silu_approximate(v[i][e]), u[e]);
      }
    }
  }
};

}  // namespace prefixquant
