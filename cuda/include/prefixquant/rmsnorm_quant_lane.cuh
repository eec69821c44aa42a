// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm, static and dynamic quantization of rows of a 16-bit type whose width is known when
// compiling: all lanes of a warp have as many elements.
//
// Layout: vector i of 8 elements of lane l starts at 256 i + 8 l, the kTail elements behind them at
//   256 kVectors + kTail l. All of them stay in registers, as do those of weight and shift.
// Grid: one warp a row, several rows a CTA.
// Smem: none.
// Limits: cols = 256 kVectors + 32 kTail, rows start at multiples of 16 bytes, weight and shift
//   have the dtype of x.
#pragma once

#include "prefixquant/rmsnorm_quant.cuh"

namespace prefixquant {

// 1, 2 or 4 words at an address that is a multiple of their size.
template <int kWords>
__device__ __forceinline__ void load_words(const void* from, uint32_t* to) {
  if constexpr (kWords == 4) {
    const uint4 v = *static_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = *static_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    static_assert(kWords == 1);
    to[0] = *static_cast<const uint32_t*>(from);
  }
}

template <int kWords>
__device__ __forceinline__ void store_words(const uint32_t* from, void* to) {
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  } else if constexpr (kWords == 2) {
    *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  } else {
    static_assert(kWords == 1);
    *static_cast<uint32_t*>(to) = from[0];
  }
}

// What a lane has of a row, as it lies in memory.
template <typename T, int kVectors, int kTail>
struct LaneElements {
  static_assert(sizeof(T) == 2);
  static constexpr int kCount = 8 * kVectors + kTail;
  uint32_t words[kCount / 2];

  __device__ __forceinline__ void load(const T* row, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load_words<4>(row + 256 * i + 8 * lane, words + 4 * i);
    load_words<kTail / 2>(row + 256 * kVectors + kTail * lane, words + 4 * kVectors);
  }
  __device__ __forceinline__ void store(T* row, uint32_t lane) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) store_words<4>(words + 4 * i, row + 256 * i + 8 * lane);
    store_words<kTail / 2>(words + 4 * kVectors, row + 256 * kVectors + kTail * lane);
  }
  __device__ __forceinline__ void to_floats(float (&v)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) unpack_pair(words[i], T{}, v[2 * i], v[2 * i + 1]);
  }
  __device__ __forceinline__ void from_floats(const float (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] = pack_pair(v[2 * i], v[2 * i + 1], T{});
  }
};

// sum - v^2, the square exact, without the mask that add_square needs: with copies of the sign in
// the upper bits of the exponent, the factors are |v| 2^-896 and -|v| 2^896 in one order or the
// other.
__device__ __forceinline__ double subtract_square(double sum, float v) {
  const int bits = __float_as_int(v), high = bits >> 3, low = bits << 29;
  return fma(__hiloint2double(high, low), __hiloint2double(high ^ ~0x0FFFFFFF, low), sum);
}

// The sum of squares. Integer operations and conversions to float64 have pipes of their own; a
// conversion takes twice as long as the two integer operations of a square: every third element is
// converted.
template <int kCount>
__device__ __forceinline__ double sum_of_squares(const float (&v)[kCount]) {
  double sum = 0.0, negative = 0.0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i % 3 == 2) {
      const double converted = v[i];
      sum = fma(converted, converted, sum);
    } else {
      negative = subtract_square(negative, v[i]);
    }
  }
  return sum - negative;
}

// A lane's levels, as bytes or nibbles.
template <int kVectors, int kTail, int kCount>
__device__ __forceinline__ void store_lane_levels(const float (&v)[kCount],
                                                  const PowerQuantizer& quantizer, bool packed,
                                                  void* out, uint32_t row, uint32_t lane) {
  static_assert(kTail == 2 || kTail == 4);
  uint2 levels[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    levels[i] = make_uint2(quantize4(v + 8 * i, quantizer), quantize4(v + 8 * i + 4, quantizer));
  }
  const uint32_t tail = kTail == 4 ? quantize4(v + 8 * kVectors, quantizer)
                                   : __byte_perm(quantize2(v + 8 * kVectors, quantizer), 0, 0x20);
  if (packed) {
    uint8_t* const to = static_cast<uint8_t*>(out) + row * (int64_t{32} * kCount / 2);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      *reinterpret_cast<uint32_t*>(to + 128 * i + 4 * lane) = pack_nibbles(levels[i]);
    }
    const uint32_t nibbles = pack_nibbles(make_uint2(tail, 0));
    if constexpr (kTail == 4) {
      reinterpret_cast<uint16_t*>(to + 128 * kVectors)[lane] = static_cast<uint16_t>(nibbles);
    } else {
      (to + 128 * kVectors)[lane] = static_cast<uint8_t>(nibbles);
    }
  } else {
    uint8_t* const to = static_cast<uint8_t*>(out) + row * (int64_t{32} * kCount);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      *reinterpret_cast<uint2*>(to + 256 * i + 8 * lane) = levels[i];
    }
    if constexpr (kTail == 4) {
      reinterpret_cast<uint32_t*>(to + 256 * kVectors)[lane] = tail;
    } else {
      reinterpret_cast<uint16_t*>(to + 256 * kVectors)[lane] = static_cast<uint16_t>(tail);
    }
  }
}

// The levels of a row for bounds and scales that a PowerQuantizer does not take; one warp.
template <typename T>
__device__ __forceinline__ void store_row_levels(const T* x, float rstd, const RowQuantParams& p,
                                                 const Quantizer& quantizer, int64_t row,
                                                 uint32_t lane) {
  const auto level = [&](int64_t c) -> int {
    float v = to_float(x[c]);
    if (p.normalize) v = __fmul_rn(v, rstd);
    if (p.weight) v = __fmul_rn(v, to_float(static_cast<const T*>(p.weight)[c]));
    if (p.shift) v = __fsub_rn(v, to_float(static_cast<const T*>(p.shift)[c]));
    return quantize(v, quantizer);
  };
#pragma unroll 1
  for (int64_t c = 2 * lane; c < p.cols; c += 64) {
    const int low = level(c), high = level(c + 1);
    const int64_t at = row * p.cols + c;
    if (p.output == RowResult::kPacked) {
      static_cast<uint8_t*>(p.out)[at / 2] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
    } else {
      static_cast<int8_t*>(p.out)[at] = static_cast<int8_t>(low);
      static_cast<int8_t*>(p.out)[at + 1] = static_cast<int8_t>(high);
    }
  }
}

template <typename T,         // of x, of the weight and of the shift: 16 bits
          int kVectors,       // of 8 elements, of a lane
          int kTail,          // elements of a lane behind them
          bool kNormalize,    // RMSNorm first
          RowScale kScaling>  // kNone: float output
__global__ void __launch_bounds__(128, 8)
    row_quant_lane_kernel(const RowQuantParams p, const RowQuantSchedule schedule) {
  using Elements = LaneElements<T, kVectors, kTail>;
  constexpr int kCount = Elements::kCount, kCols = 32 * kCount;
  constexpr bool kShift = kNormalize && kScaling == RowScale::kStatic;
  if (schedule.launch_early) grid_dependency_launch();
  uint32_t lane;  // volatile: kept, not made from the thread again where the row is stored
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  const uint32_t row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= static_cast<uint32_t>(p.rows)) return;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  constexpr int kLine = 128 / sizeof(T);
  static_assert(kCols <= 32 * kLine);
  if (lane * kLine < kCols) prefetch_l2(x + lane * kLine);
  // No kernel that may still run writes these two.
  Elements weight, shift;
  if (kNormalize && p.weight) weight.load(static_cast<const T*>(p.weight), lane);
  if (kShift && p.shift) shift.load(static_cast<const T*>(p.shift), lane);
  grid_dependency_wait();

  float scale = 1.0f;
  Elements raw;
  raw.load(x, lane);
  if constexpr (kScaling == RowScale::kStatic) scale = load_float(p.scale);
  float v[kCount];
  if (p.residual) {
    T* const residual = static_cast<T*>(p.residual) + row * p.residual_stride;
    Elements before;
    before.load(residual, lane);
    float b[kCount];
    raw.to_floats(v);
    before.to_floats(b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = __fadd_rn(b[i], v[i]);
    raw.from_floats(v);
    raw.store(residual, lane);
    x = residual;
  }
  if (!schedule.launch_early) grid_dependency_launch();
  raw.to_floats(v);

  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  float rstd = 1.0f;
  if constexpr (kNormalize) {
    const double sum = sum_of_squares(v);
    // Behind the squares: what the sum waits for is time for the reciprocal.
    if constexpr (kScaling == RowScale::kStatic) quantizer.inv_scale = __frcp_rn(scale);
    rstd = reciprocal_rms(warp_sum(sum), schedule.inv_cols, p.eps);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = __fmul_rn(v[i], rstd);
    if (p.weight) {
      float w[kCount];
      weight.to_floats(w);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = __fmul_rn(v[i], w[i]);
    }
    if (kShift && p.shift) {
      float s[kCount];
      shift.to_floats(s);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = __fsub_rn(v[i], s[i]);
    }
  } else if constexpr (kScaling == RowScale::kStatic) {
    quantizer.inv_scale = __frcp_rn(scale);
  }
  if constexpr (kScaling == RowScale::kNone) {
    raw.from_floats(v);
    raw.store(static_cast<T*>(p.out) + row * int64_t{kCols}, lane);
  } else {
    if constexpr (kScaling == RowScale::kDynamic) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) largest = max(largest, magnitude_bits(v[i]));
      largest = __reduce_max_sync(0xFFFFFFFFu, largest);
      scale = dynamic_scale(__uint_as_float(largest), p.qmax, p.clip);
      if (lane == 0) p.row_scale[row] = scale;
      quantizer.inv_scale = __frcp_rn(scale);
    }
    const PowerQuantizer power = power_quantizer(quantizer, schedule.unit);
    if (power.exact()) {
      store_lane_levels<kVectors, kTail>(v, power, p.output == RowResult::kPacked, p.out, row,
                                         lane);
    } else {
      __syncwarp();  // what other lanes wrote to the residual
      store_row_levels(x, rstd, p, quantizer, row, lane);
    }
  }
}

}  // namespace prefixquant
