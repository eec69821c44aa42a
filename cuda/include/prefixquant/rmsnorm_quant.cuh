// SPDX-License-Identifier: Apache-2.0
//
// The kernels behind rmsnorm_quant.h: RMSNorm, static and dynamic quantization of rows.
//
// Layout: a row is cut into vectors of 8 elements; vector v of a row belongs to thread v mod
//   threads_per_row, which keeps up to kVectors of them in registers: x is read once.
// Grid: one CTA a row of threads_per_row = blockDim.x threads; where a warp can hold a row, one
//   warp a row and 4 rows a CTA (rmsnorm_quant_lane.cuh has another such kernel, for widths known
//   when compiling). row_quant_scalar_kernel: one CTA of 256 threads a row, any width
//   and alignment, the row is read again for every pass.
// Smem: 384 bytes of partial sums; with one warp a row, weight and shift as they lie in memory.
// Limits: 8 divides cols, rows start at multiples of 16 bytes, cols <= 8 * kVectors * 1024.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/quantizer.cuh"
#include "prefixquant/rms.cuh"
#include "prefixquant/rmsnorm_quant.h"
#include "prefixquant/row_reduce.cuh"
#include "prefixquant/row_vector.cuh"

namespace prefixquant {

// Bytes of a channel of the weight or the shift.
__device__ __forceinline__ int channel_bytes(RowDtype dtype) {
  return dtype == RowDtype::kFloat32 ? 4 : 2;
}

// v[i] = combine(v[i], channel at + i of a vector of `dtype`) of 8 elements, in global or shared
// memory.
template <typename W, typename Combine>
__device__ __forceinline__ void with_channels(float (&v)[8], const void* channels, int64_t at,
                                              Combine combine) {
  RawVector<W> raw;
  raw.load(static_cast<const W*>(channels) + at);
  float w[8];
  to_floats(raw, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = combine(v[i], w[i]);
}

template <typename Combine>
__device__ __forceinline__ void with_channels(float (&v)[8], const void* channels, RowDtype dtype,
                                              int64_t at, Combine combine) {
  switch (dtype) {
    case RowDtype::kFloat32:
      return with_channels<float>(v, channels, at, combine);
    case RowDtype::kBFloat16:
      return with_channels<__nv_bfloat16>(v, channels, at, combine);
    case RowDtype::kFloat16:
      return with_channels<__half>(v, channels, at, combine);
  }
}

// All channels into shared memory, asynchronously; all threads of a CTA.
__device__ __forceinline__ void copy_channels(const void* channels, RowDtype dtype, int count,
                                              void* to) {
  const int bytes = count * channel_bytes(dtype);
  for (int at = 16 * threadIdx.x; at < bytes; at += 16 * blockDim.x) {
    cp_async_16(smem_address(static_cast<char*>(to) + at), static_cast<const char*>(channels) + at,
                16);
  }
}

// Asks for a row in the L2 cache, where the writes of the kernel before arrive: nothing there can
// be stale. One warp, a line a lane.
template <typename T>
__device__ __forceinline__ void prefetch_row(const T* row, int cols, int lane) {
  constexpr int kLine = 128 / sizeof(T);
  for (int at = lane * kLine; at < cols; at += 32 * kLine) prefetch_l2(row + at);
}

__device__ __forceinline__ void store_levels(const float (&v)[8], const RowQuantParams& p,
                                             const Quantizer& quantizer, int64_t at) {
  const uint2 levels = quantize8(v, quantizer);
  if (p.output == RowResult::kPacked) {
    *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.out) + at / 2) = pack_nibbles(levels);
  } else {
    *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.out) + at) = levels;
  }
}

// What the launch adds to its parameters.
struct RowQuantSchedule {
  double inv_cols;    // 1 / cols
  bool launch_early;  // with one warp a row: the next kernel may start from the beginning, not only
                      // behind the loads
  float unit;         // 1 / 2^k where the levels are -2^k .. 2^k - 1, otherwise 0
};

template <typename T,         // of x
          int kVectors,       // vectors of a thread
          bool kNormalize,    // RMSNorm first
          RowScale kScaling,  // kNone: float output
          bool kWarpRows,     // one warp a row, several rows a CTA
          int kMaxThreads>    // of the CTA
__global__ void __launch_bounds__(kMaxThreads)
    row_quant_kernel(const RowQuantParams p, const RowQuantSchedule schedule) {
  __shared__ double sums[32];
  __shared__ uint32_t maxima[32];
  constexpr bool kShared = kWarpRows && kNormalize;  // weight and shift, by all rows of a CTA
  __shared__ alignas(16) char shared_weight[kShared ? 32 * 32 * kVectors : 16];
  __shared__ alignas(16) char shared_shift[kShared ? 32 * 32 * kVectors : 16];
  const int threads_per_row = kWarpRows ? 32 : blockDim.x;
  const int thread = kWarpRows ? threadIdx.x % 32 : threadIdx.x;
  const int64_t row =
      kWarpRows ? int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32 : blockIdx.x;
  if (!kWarpRows || schedule.launch_early) grid_dependency_launch();
  const int cols = static_cast<int>(p.cols), vectors = kWarpRows && row >= p.rows ? 0 : cols / 8;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  if constexpr (kWarpRows) prefetch_row(x, 8 * vectors, thread);
  grid_dependency_wait();

  // With four vectors a thread and many rows, registers count for more than the latency of a load.
  constexpr bool kEarlyScale = kScaling == RowScale::kStatic && (kWarpRows || kVectors < 4);
  float scale = 1.0f;
  if constexpr (kEarlyScale) scale = load_constant_float(p.scale);
  RawVector<T> raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = i * threads_per_row + thread;
    if (vector < vectors) raw[i].load(x + 8 * vector);
  }
  if (p.residual) {
    T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
    RawVector<T> before[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = i * threads_per_row + thread;
      if (vector < vectors) before[i].load(residual + 8 * vector);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = i * threads_per_row + thread;
      if (vector >= vectors) continue;
      float a[8], b[8];
      to_floats(before[i], a);
      to_floats(raw[i], b);
#pragma unroll
      for (int j = 0; j < 8; ++j) a[j] = __fadd_rn(a[j], b[j]);
      from_floats(a, raw[i]);
      raw[i].store(residual + 8 * vector);
    }
  }
  if constexpr (kShared) {
    if (p.weight) copy_channels(p.weight, p.weight_dtype, cols, shared_weight);
    if (p.shift) copy_channels(p.shift, p.shift_dtype, cols, shared_shift);
    cp_async_commit();
  }
  if (kWarpRows && !schedule.launch_early) grid_dependency_launch();

  float rstd = 1.0f;
  if constexpr (kNormalize) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * threads_per_row + thread >= vectors) continue;
      float v[8];
      to_floats(raw[i], v);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = add_square(sum, v[j]);
    }
    sum = kWarpRows ? warp_sum(sum) : block_sum(sum, sums);
    rstd = reciprocal_rms(sum, schedule.inv_cols, p.eps);
  }
  if constexpr (kShared) {
    if (p.weight || p.shift) {
      cp_async_wait<0>();
      __syncthreads();
    }
  }
  // y of vector i
  const void* const weight = kShared ? shared_weight : p.weight;
  const void* const shift = kShared ? shared_shift : p.shift;
  const auto normalized = [&](int i, float (&v)[8]) {
    to_floats(raw[i], v);
    if constexpr (kNormalize) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(v[j], rstd);
      const int at = 8 * (i * threads_per_row + thread);
      if (p.weight) {
        with_channels(v, weight, p.weight_dtype, at,
                      [](float y, float w) { return __fmul_rn(y, w); });
      }
      if (kScaling == RowScale::kStatic && p.shift) {
        with_channels(v, shift, p.shift_dtype, at,
                      [](float y, float s) { return __fsub_rn(y, s); });
      }
    }
  };

  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if constexpr (kScaling == RowScale::kStatic) {
    quantizer.inv_scale = __fdiv_rn(1.0f, kEarlyScale ? scale : *p.scale);
  }
  if constexpr (kScaling == RowScale::kDynamic) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * threads_per_row + thread >= vectors) continue;
      float v[8];
      normalized(i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = max(largest, magnitude_bits(v[j]));
    }
    largest = kWarpRows ? __reduce_max_sync(0xFFFFFFFFu, largest) : block_max(largest, maxima);
    scale = dynamic_scale(__uint_as_float(largest), p.qmax, p.clip);
    if (thread == 0 && vectors > 0) p.row_scale[row] = scale;
    quantizer.inv_scale = __fdiv_rn(1.0f, scale);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = i * threads_per_row + thread;
    if (vector >= vectors) continue;
    float v[8];
    normalized(i, v);
    const int64_t at = row * p.cols + 8 * vector;
    if constexpr (kScaling == RowScale::kNone) {
      RawVector<T> rounded;
      from_floats(v, rounded);
      rounded.store(static_cast<T*>(p.out) + at);
    } else {
      store_levels(v, p, quantizer, at);
    }
  }
}

// Any width, alignment and stride.
template <typename T>
__global__ void __launch_bounds__(256)
    row_quant_scalar_kernel(const RowQuantParams p, const RowQuantSchedule schedule) {
  __shared__ double sums[32];
  __shared__ uint32_t maxima[32];
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t row = blockIdx.x, first = threadIdx.x, step = blockDim.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  if (p.residual) {
    T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
    for (int64_t c = first; c < p.cols; c += step) {
      residual[c] = from_float<T>(__fadd_rn(to_float(residual[c]), to_float(x[c])));
    }
    // Pairs below belong to one thread although their elements were written by two.
    __syncthreads();
    x = residual;
  }
  float rstd = 1.0f;
  if (p.normalize) {
    double sum = 0.0;
    for (int64_t c = first; c < p.cols; c += step) {
      sum = add_square(sum, to_float(x[c]));
    }
    rstd = reciprocal_rms(block_sum(sum, sums), schedule.inv_cols, p.eps);
  }
  const auto normalized = [&](int64_t c) {
    float v = to_float(x[c]);
    if (p.normalize) v = __fmul_rn(v, rstd);
    if (p.weight) v = __fmul_rn(v, channel(p.weight, p.weight_dtype, c));
    return p.shift ? __fsub_rn(v, channel(p.shift, p.shift_dtype, c)) : v;
  };
  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if (p.scaling == RowScale::kStatic) quantizer.inv_scale = __fdiv_rn(1.0f, *p.scale);
  if (p.scaling == RowScale::kDynamic) {
    uint32_t largest = 0;
    for (int64_t c = first; c < p.cols; c += step) {
      largest = max(largest, magnitude_bits(normalized(c)));
    }
    const float abs_max = __uint_as_float(block_max(largest, maxima));
    const float scale = dynamic_scale(abs_max, p.qmax, p.clip);
    if (first == 0) p.row_scale[row] = scale;
    quantizer.inv_scale = __fdiv_rn(1.0f, scale);
  }
  switch (p.output) {
    case RowResult::kFloat:
      for (int64_t c = first; c < p.cols; c += step) {
        static_cast<T*>(p.out)[row * p.cols + c] = from_float<T>(normalized(c));
      }
      break;
    case RowResult::kInt8:
      for (int64_t c = first; c < p.cols; c += step) {
        static_cast<int8_t*>(p.out)[row * p.cols + c] = quantize(normalized(c), quantizer);
      }
      break;
    case RowResult::kPacked:
      for (int64_t c = first; c < p.cols / 2; c += step) {
        const int low = quantize(normalized(2 * c), quantizer) & 15;
        const int high = quantize(normalized(2 * c + 1), quantizer) & 15;
        static_cast<uint8_t*>(p.out)[row * (p.cols / 2) + c] =
            static_cast<uint8_t>(low | high << 4);
      }
      break;
  }
}

}  // namespace prefixquant
