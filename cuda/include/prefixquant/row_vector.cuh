// SPDX-License-Identifier: Apache-2.0
//
// Rows of floating-point activations in registers: eight elements at a time between memory
// (float32, bfloat16 or float16, 16-byte accesses) and float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace prefixquant {

// Eight elements as they lie in memory: one 16-byte load of a 16-bit type, two of float32.
template <typename T>
struct RawVector {
  uint4 words[sizeof(T) / 2];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      words[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      reinterpret_cast<uint4*>(to)[i] = words[i];
    }
  }
};

__device__ __forceinline__ void unpack_pair(uint32_t word, __nv_bfloat16, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xFFFF0000u);
}

__device__ __forceinline__ void unpack_pair(uint32_t word, __half, float& low, float& high) {
  const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&word));
  low = v.x;
  high = v.y;
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename T>
__device__ __forceinline__ void to_floats(const RawVector<T>& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_pair(words[i], T{}, v[2 * i], v[2 * i + 1]);
}

template <>
__device__ __forceinline__ void to_floats(const RawVector<float>& raw, float (&v)[8]) {
  const uint32_t words[8] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w,
                             raw.words[1].x, raw.words[1].y, raw.words[1].z, raw.words[1].w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(words[i]);
}

template <typename T>
__device__ __forceinline__ void from_floats(const float (&v)[8], RawVector<T>& raw) {
  raw.words[0] = make_uint4(pack_pair(v[0], v[1], T{}), pack_pair(v[2], v[3], T{}),
                            pack_pair(v[4], v[5], T{}), pack_pair(v[6], v[7], T{}));
}

template <>
__device__ __forceinline__ void from_floats(const float (&v)[8], RawVector<float>& raw) {
  raw.words[0] = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                            __float_as_uint(v[3]));
  raw.words[1] = make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]),
                            __float_as_uint(v[7]));
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace prefixquant
