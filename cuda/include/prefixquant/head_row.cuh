// SPDX-License-Identifier: Apache-2.0
// One head of one token in a warp: load, RMSNorm, RoPE, Hadamard, shift, quantize, store. Every
// float32 operation is rounded on its own and in the order of the CPU kernels, so results agree bit
// for bit.
//
// Two forms with the same members: RegisterRow<kDim> (64, 128, 256; a lane holds kDim / 32
// consecutive channels, partners meet by shuffles) and SharedRow (any even D; lanes stride over a
// row in shared memory).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "prefixquant/hadamard_integer.cuh"
#include "prefixquant/kv_attention.h"

namespace prefixquant {

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) {
  y = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }

template <int kBytes>
struct alignas(kBytes) Bytes {
  unsigned char at[kBytes];
};

// The k part of a Hadamard of size 2^m k and its factor 1 / sqrt(size).
struct HeadRotation {
  const int8_t* signs;  // [k, k], k > 1
  int k;
  int size;  // 1: no rotation
  float factor;
};

struct HeadNorm {
  const void* weight;  // [D] or nullptr
  KvDtype dtype;
  double eps;
};

__device__ __forceinline__ float load_weight(const HeadNorm& norm, int i) {
  if (norm.dtype == KvDtype::kFloat16) return to_float(static_cast<const __half*>(norm.weight)[i]);
  if (norm.dtype == KvDtype::kBFloat16) {
    return to_float(static_cast<const __nv_bfloat16*>(norm.weight)[i]);
  }
  return static_cast<const float*>(norm.weight)[i];
}

__device__ __forceinline__ float reciprocal_rms(double sum_of_squares, int dim, double eps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    sum_of_squares += __shfl_xor_sync(~0u, sum_of_squares, step);
  }
  return static_cast<float>(1.0 / sqrt(sum_of_squares / dim + eps));
}

// clamp(rint(x * reciprocal)); NaN becomes 0.
__device__ __forceinline__ int quantize_value(float x, float reciprocal, int qmin, int qmax) {
  return min(max(__float2int_rn(__fmul_rn(x, reciprocal)), qmin), qmax);
}

template <int kDim>
struct RegisterRow {
  static constexpr int kPerLane = kDim / 32;
  static constexpr bool kShared = false;
  float x[kPerLane];
  float cos[kPerLane], sin[kPerLane];
  int lane;

  __device__ __forceinline__ RegisterRow(float*, int, int lane_index) : lane(lane_index) {}

  template <typename T>
  using Raw = Bytes<kPerLane * sizeof(T) < 16 ? kPerLane * sizeof(T) : 16>;
  template <typename T>
  static constexpr int kRawCount = kPerLane * sizeof(T) / sizeof(Raw<T>);

  template <typename T>
  struct Loaded {
    Raw<T> raw[kRawCount<T>];
  };
  template <typename T>
  __device__ __forceinline__ Loaded<T> fetch(const T* from) const {
    Loaded<T> loaded;
#pragma unroll
    for (int i = 0; i < kRawCount<T>; ++i) {
      loaded.raw[i] = reinterpret_cast<const Raw<T>*>(from + lane * kPerLane)[i];
    }
    return loaded;
  }
  template <typename T>
  __device__ __forceinline__ void take(const Loaded<T>& loaded, const T*) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = to_float(reinterpret_cast<const T*>(&loaded)[i]);
  }
  __device__ __forceinline__ void load_table(const float* cos_row, const float* sin_row) {
    take_floats(cos, cos_row);
    take_floats(sin, sin_row);
  }
  __device__ __forceinline__ void normalize(const HeadNorm& norm) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += static_cast<double>(x[i]) * x[i];
    const float rstd = reciprocal_rms(sum, kDim, norm.eps);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      x[i] = __fmul_rn(__fmul_rn(x[i], rstd), load_weight(norm, lane * kPerLane + i));
    }
  }
  __device__ __forceinline__ void rope() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], 16);
      const float turned = __fmul_rn(lane < 16 ? -other : other, sin[i]);
      x[i] = __fadd_rn(__fmul_rn(x[i], cos[i]), turned);
    }
  }
  __device__ __forceinline__ void rotate(const HeadRotation& rotation) {
#pragma unroll
    for (int h = 1; h < kPerLane; h *= 2) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i & h) continue;
        const float a = x[i], b = x[i + h];
        x[i] = __fadd_rn(a, b);
        x[i + h] = __fsub_rn(a, b);
      }
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float other = __shfl_xor_sync(~0u, x[i], h);
        x[i] = __fadd_rn(other, lane & h ? -x[i] : x[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = __fmul_rn(x[i], rotation.factor);
  }
  __device__ __forceinline__ void subtract(const float* shift) {
    float lanes[kPerLane];
    take_floats(lanes, shift);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = __fsub_rn(x[i], lanes[i]);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* to) const {
    alignas(16) T y[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) from_float(x[i], y[i]);
#pragma unroll
    for (int i = 0; i < kRawCount<T>; ++i) {
      reinterpret_cast<Raw<T>*>(to + lane * kPerLane)[i] = reinterpret_cast<const Raw<T>*>(y)[i];
    }
  }
  __device__ __forceinline__ void store_int8(int8_t* to, float reciprocal) const {
    alignas(8) int8_t q[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      q[i] = static_cast<int8_t>(quantize_value(x[i], reciprocal, -128, 127));
    }
    reinterpret_cast<Bytes<kPerLane>*>(to)[lane] = *reinterpret_cast<const Bytes<kPerLane>*>(q);
  }
  __device__ __forceinline__ void store_int4(uint8_t* to, float reciprocal) const {
    alignas(4) uint8_t q[kPerLane / 2];
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) {
      const int low = quantize_value(x[i], reciprocal, -8, 7);
      const int high = quantize_value(x[i + 1], reciprocal, -8, 7);
      q[i / 2] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
    }
    reinterpret_cast<Bytes<kPerLane / 2>*>(to)[lane] =
        *reinterpret_cast<const Bytes<kPerLane / 2>*>(q);
  }

 private:
  __device__ __forceinline__ void take_floats(float (&to)[kPerLane], const float* from) const {
    const Loaded<float> loaded = fetch(from);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) to[i] = reinterpret_cast<const float*>(&loaded)[i];
  }
};

// buffer: 2 * D floats of shared memory that belong to the warp.
struct SharedRow {
  static constexpr bool kShared = true;
  float* x;
  float* spare;
  const float* cos;
  const float* sin;
  int dim, lane;

  __device__ __forceinline__ SharedRow(float* buffer, int d, int lane_index)
      : x(buffer), spare(buffer + d), cos(nullptr), sin(nullptr), dim(d), lane(lane_index) {}

  template <typename T>
  struct Loaded {};
  template <typename T>
  __device__ __forceinline__ Loaded<T> fetch(const T*) const {
    return {};
  }
  template <typename T>
  __device__ __forceinline__ void take(const Loaded<T>&, const T* from) {
    __syncwarp();
    for (int i = lane; i < dim; i += 32) x[i] = to_float(from[i]);
    __syncwarp();
  }
  __device__ __forceinline__ void load_table(const float* cos_row, const float* sin_row) {
    cos = cos_row, sin = sin_row;
  }
  __device__ __forceinline__ void normalize(const HeadNorm& norm) {
    double sum = 0.0;
    for (int i = lane; i < dim; i += 32) sum += static_cast<double>(x[i]) * x[i];
    const float rstd = reciprocal_rms(sum, dim, norm.eps);
    for (int i = lane; i < dim; i += 32) {
      x[i] = __fmul_rn(__fmul_rn(x[i], rstd), load_weight(norm, i));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void rope() {
    const int half = dim / 2;
    for (int i = lane; i < half; i += 32) {
      const float a = x[i], b = x[half + i];
      x[i] = __fsub_rn(__fmul_rn(a, cos[i]), __fmul_rn(b, sin[i]));
      x[half + i] = __fadd_rn(__fmul_rn(b, cos[half + i]), __fmul_rn(a, sin[half + i]));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void rotate(const HeadRotation& rotation) {
    const int pow2 = dim / rotation.k;
    for (int h = 1; h < pow2; h *= 2) {
      for (int i = lane; i < dim / 2; i += 32) {
        const int at = i / h * 2 * h + i % h;
        const float a = x[at], b = x[at + h];
        x[at] = __fadd_rn(a, b);
        x[at + h] = __fsub_rn(a, b);
      }
      __syncwarp();
    }
    if (hadamard_sums_are_integers(rotation.k)) {
      add_integers(x, spare, dim, lane, rotation.signs, rotation.k, rotation.factor);
      float* const swapped = x;
      x = spare, spare = swapped;
      __syncwarp();
      return;
    }
    if (rotation.k > 1) {
      for (int i = lane; i < dim; i += 32) {
        const int8_t* sign = rotation.signs + i / pow2 * rotation.k;
        const float* from = x + i % pow2;
        float total = 0.0f;
        for (int j = 0; j < rotation.k; j += 4) {
          float t[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            t[c] = sign[j + c] < 0 ? -from[(j + c) * pow2] : from[(j + c) * pow2];
          }
          total = __fadd_rn(total, __fadd_rn(__fadd_rn(t[0], t[1]), __fadd_rn(t[2], t[3])));
        }
        spare[i] = total;
      }
      float* const swapped = x;
      x = spare, spare = swapped;
      __syncwarp();
    }
    for (int i = lane; i < dim; i += 32) x[i] = __fmul_rn(x[i], rotation.factor);
    __syncwarp();
  }
  __device__ __forceinline__ void subtract(const float* shift) {
    for (int i = lane; i < dim; i += 32) x[i] = __fsub_rn(x[i], shift[i]);
    __syncwarp();
  }
  // y = the k part of x where its sums are those of integers (hadamard_integer.cuh). Head
  // dimensions that need it are rare: rolled loops, so that the others keep their registers.
  __device__ __forceinline__ static void add_integers(const float* x, float* y, int dim, int lane,
                                                      const int8_t* signs, int k, float norm) {
    const int pow2 = dim / k;
    float largest = 0.0f;
#pragma unroll 1
    for (int i = lane; i < dim; i += 32) largest = larger_magnitude(largest, x[i]);
    const IntegerScale scale =
        integer_scale(__reduce_max_sync(~0u, __float_as_uint(largest) & 0x7FFFFFFFu), norm);
#pragma unroll 1
    for (int i = lane; i < dim; i += 32) {
      const int8_t* sign = signs + i / pow2 * k;
      uint32_t sum = 0;  // wraps around where the row is not finite
#pragma unroll 1
      for (int j = 0; j < k; ++j) {
        const auto v = static_cast<uint32_t>(integer_of(x[i % pow2 + j * pow2], scale));
        sum += sign[j] < 0 ? 0u - v : v;
      }
      y[i] = finished_sum(static_cast<int32_t>(sum), scale);
    }
  }
  template <typename T>
  __device__ __forceinline__ void store(T* to) const {
    for (int i = lane; i < dim; i += 32) from_float(x[i], to[i]);
  }
  __device__ __forceinline__ void store_int8(int8_t* to, float reciprocal) const {
    for (int i = lane; i < dim; i += 32) {
      to[i] = static_cast<int8_t>(quantize_value(x[i], reciprocal, -128, 127));
    }
  }
  __device__ __forceinline__ void store_int4(uint8_t* to, float reciprocal) const {
    for (int i = lane; i < dim / 2; i += 32) {
      const int low = quantize_value(x[2 * i], reciprocal, -8, 7);
      const int high = quantize_value(x[2 * i + 1], reciprocal, -8, 7);
      to[i] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
    }
  }
};

// The row of a cache in any of its dtypes; `scale` is that of the head, not read at 16 bits.
template <typename Row>
__device__ __forceinline__ void store_cached(const Row& row, KvDtype dtype, void* to,
                                             const float* scale) {
  switch (dtype) {
    case KvDtype::kInt4:
      return row.store_int4(static_cast<uint8_t*>(to), __frcp_rn(*scale));
    case KvDtype::kInt8:
      return row.store_int8(static_cast<int8_t*>(to), __frcp_rn(*scale));
    case KvDtype::kFloat16:
      return row.store(static_cast<__half*>(to));
    case KvDtype::kBFloat16:
      return row.store(static_cast<__nv_bfloat16*>(to));
    case KvDtype::kFloat32:
      return row.store(static_cast<float*>(to));
  }
}

}  // namespace prefixquant
