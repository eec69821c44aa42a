// SPDX-License-Identifier: Apache-2.0
//
// The kernels behind outlier_scan.h.
//
// Without the sign bit the bit patterns of floats order as their values do, NaN on top: maxima and
// the median are integer operations.
//
// abs_max_kernel: one warp a row, 8 rows a CTA; where rows are few, one CTA a row. Eight 16-byte
//   loads of a lane are in flight.
// median_kernel: one CTA. The range [min, max] of the patterns is cut into 2048 bins, counted in
//   shared memory, and the bin that holds the median becomes the next range: at most three rounds
//   for 31 bits. Bins follow the data, so that counts spread over many addresses.
#include "prefixquant/outlier_scan.h"

#include "prefixquant/cp_async.cuh"
#include "prefixquant/launch.h"
#include "prefixquant/row_reduce.cuh"
#include "prefixquant/row_vector.cuh"

namespace prefixquant {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanUnroll = 8;
constexpr int kMedianThreads = 1024;
constexpr int kBins = 2048;
constexpr uint32_t kInfinityBits = 0x7F800000u;

// Running maxima of the magnitudes in 16-byte words: two 16-bit values a register, or one float32.
template <typename T>
struct MagnitudeMax {
  uint32_t best[4] = {};
  __device__ __forceinline__ static uint32_t larger(uint32_t a, uint32_t b) {
    // As float16 patterns: both 16-bit types have their magnitude in the same 15 bits, but NaNs and
    // infinities in other places, hence unsigned integers.
    return __vmaxu2(a, b & 0x7FFF7FFFu);
  }
  __device__ __forceinline__ void add(const uint4& v) {
    best[0] = larger(best[0], v.x);
    best[1] = larger(best[1], v.y);
    best[2] = larger(best[2], v.z);
    best[3] = larger(best[3], v.w);
  }
  // float32 bits of the largest magnitude
  __device__ __forceinline__ uint32_t result() const {
    const uint32_t pairs = __vmaxu2(__vmaxu2(best[0], best[1]), __vmaxu2(best[2], best[3]));
    float low, high;
    unpack_pair(pairs, T{}, low, high);
    return max(magnitude_bits(low), magnitude_bits(high));
  }
};

template <>
__device__ __forceinline__ uint32_t MagnitudeMax<float>::larger(uint32_t a, uint32_t b) {
  return max(a, b & 0x7FFFFFFFu);
}
template <>
__device__ __forceinline__ uint32_t MagnitudeMax<float>::result() const {
  return max(max(best[0], best[1]), max(best[2], best[3]));
}

template <typename T, bool kVectors, bool kWarpRows>
__global__ void __launch_bounds__(kScanThreads) abs_max_kernel(const OutlierScanParams p) {
  __shared__ uint32_t maxima[32];
  const int threads = kWarpRows ? 32 : kScanThreads, thread = threadIdx.x % threads;
  const int64_t row =
      kWarpRows ? int64_t{blockIdx.x} * (kScanThreads / 32) + threadIdx.x / 32 : blockIdx.x;
  grid_dependency_launch();
  if (kWarpRows && row >= p.rows) return;
  grid_dependency_wait();
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  uint32_t largest;
  if constexpr (kVectors) {
    const uint4* words = reinterpret_cast<const uint4*>(x);
    const int64_t count = p.cols * static_cast<int64_t>(sizeof(T)) / 16;
    MagnitudeMax<T> maximum;
    int64_t i = thread;
    for (; i + (kScanUnroll - 1) * threads < count; i += kScanUnroll * threads) {
      uint4 v[kScanUnroll];
#pragma unroll
      for (int j = 0; j < kScanUnroll; ++j) v[j] = __ldcs(words + i + j * threads);
#pragma unroll
      for (int j = 0; j < kScanUnroll; ++j) maximum.add(v[j]);
    }
    for (; i < count; i += threads) maximum.add(__ldcs(words + i));
    largest = maximum.result();
  } else {
    largest = 0;
    for (int64_t c = thread; c < p.cols; c += threads) {
      largest = max(largest, magnitude_bits(to_float(x[c])));
    }
  }
  largest = kWarpRows ? __reduce_max_sync(0xFFFFFFFFu, largest) : block_max(largest, maxima);
  if (thread == 0) p.row_max[row] = __uint_as_float(largest);
}

// Inclusive prefix sum over the warp.
__device__ __forceinline__ uint32_t warp_prefix_sum(uint32_t v) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, v, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) v += other;
  }
  return v;
}

// fn(t, key) for every row's maximum, a block's threads taking turns. Sixteen loads of a thread are
// in flight: one CTA is on its own here, and its time is latency.
template <typename Fn>
__device__ __forceinline__ void for_each_key(const OutlierScanParams& p, Fn&& fn) {
  constexpr int kUnroll = 16;
  for (int64_t first = threadIdx.x; first < p.rows; first += kUnroll * kMedianThreads) {
    uint32_t keys[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t t = first + i * kMedianThreads;
      if (t < p.rows) keys[i] = __float_as_uint(p.row_max[t]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t t = first + i * kMedianThreads;
      if (t < p.rows) fn(t, keys[i]);
    }
  }
}

// The range of patterns that is left, and the rank of the median in it.
struct MedianRange {
  uint32_t low, high;
  uint32_t rank;
};

// One round: all threads of the block return the bin of range.rank as the new range.
__device__ MedianRange narrow(const OutlierScanParams& p, MedianRange range, uint32_t* bins,
                              uint32_t* warp_sums, MedianRange* result) {
  constexpr int kBinsPerThread = kBins / kMedianThreads;
  const int shift = max(0, 32 - __clz(range.high - range.low) - 11);
  for (int i = threadIdx.x; i < kBins; i += kMedianThreads) bins[i] = 0;
  __syncthreads();
  for_each_key(p, [&](int64_t, uint32_t key) {
    if (key >= range.low && key <= range.high) atomicAdd(bins + ((key - range.low) >> shift), 1u);
  });
  __syncthreads();
  uint32_t counts[kBinsPerThread], total = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    counts[i] = bins[threadIdx.x * kBinsPerThread + i];
    total += counts[i];
  }
  const uint32_t inclusive = warp_prefix_sum(total);
  if (threadIdx.x % 32 == 31) warp_sums[threadIdx.x / 32] = inclusive;
  __syncthreads();
  if (threadIdx.x < 32) warp_sums[threadIdx.x] = warp_prefix_sum(warp_sums[threadIdx.x]);
  __syncthreads();
  uint32_t before = inclusive - total;
  if (threadIdx.x >= 32) before += warp_sums[threadIdx.x / 32 - 1];
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (range.rank >= before && range.rank < before + counts[i]) {
      const uint32_t low = range.low + ((threadIdx.x * kBinsPerThread + i) << shift);
      *result = {low, min(range.high, low + (1u << shift) - 1), range.rank - before};
    }
    before += counts[i];
  }
  __syncthreads();
  return *result;
}

__global__ void __launch_bounds__(kMedianThreads) median_kernel(const OutlierScanParams p) {
  __shared__ uint32_t bins[kBins];
  __shared__ uint32_t partials[32];
  __shared__ uint32_t minima[32];
  __shared__ MedianRange result;
  grid_dependency_launch();
  grid_dependency_wait();
  uint32_t low = 0xFFFFFFFFu, high = 0;
  for_each_key(p, [&](int64_t, uint32_t key) {
    low = min(low, key);
    high = max(high, key);
  });
  high = block_max(high, partials);
  low = ~block_max(~low, minima);
  float median = __uint_as_float(0x7FC00000u);
  if (p.rows > 0 && high <= kInfinityBits) {
    MedianRange range{low, high, static_cast<uint32_t>((p.rows - 1) / 2)};
    while (range.low != range.high) range = narrow(p, range, bins, partials, &result);
    median = __uint_as_float(range.low);
  }
  if (threadIdx.x == 0) *p.median = median;
  for_each_key(p, [&](int64_t t, uint32_t key) {
    p.is_outlier[t] = __fdiv_rn(__uint_as_float(key), median) > p.eta;
  });
}

template <typename T>
void launch_abs_max(const OutlierScanParams& p, const CurrentDevice& device, cudaStream_t stream) {
  constexpr int64_t kBytes = sizeof(T);
  const bool vectors = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.cols * kBytes % 16 == 0 &&
                       p.x_stride * kBytes % 16 == 0;
  // 32 warps an SM keep the memory busy; with fewer rows than that a row takes a CTA.
  const bool warp_rows = p.rows >= 32 * int64_t{device.sm_count} || p.cols <= 1024;
  LaunchShape shape;
  shape.block = kScanThreads;
  shape.grid = warp_rows ? (p.rows + kScanThreads / 32 - 1) / (kScanThreads / 32) : p.rows;
  const auto kernel =
      vectors ? (warp_rows ? abs_max_kernel<T, true, true> : abs_max_kernel<T, true, false>)
              : (warp_rows ? abs_max_kernel<T, false, true> : abs_max_kernel<T, false, false>);
  launch_dependent(kernel, shape, device.arch, stream, p);
}

}  // namespace

void launch_outlier_scan(const OutlierScanParams& p, cudaStream_t stream) {
  PQ_REQUIRE(p.rows >= 0 && p.rows <= 0x7FFFFFFF,
             "outlier_scan: rows: expected fewer than 2^31, got " << p.rows);
  const CurrentDevice device;
  if (p.rows > 0) {
    switch (p.dtype) {
      case RowDtype::kFloat32:
        launch_abs_max<float>(p, device, stream);
        break;
      case RowDtype::kBFloat16:
        launch_abs_max<__nv_bfloat16>(p, device, stream);
        break;
      case RowDtype::kFloat16:
        launch_abs_max<__half>(p, device, stream);
        break;
    }
  }
  LaunchShape shape;
  shape.block = kMedianThreads;
  launch_dependent(median_kernel, shape, device.arch, stream, p);
}

}  // namespace prefixquant
