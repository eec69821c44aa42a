// SPDX-License-Identifier: Apache-2.0
//
// Reductions over the threads that share a row.
#pragma once

#include <cstdint>

namespace prefixquant {

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, distance);
  }
  return v;
}

// Every thread of the block gets the sum; `partials` has room for 32 and is free before the call.
__device__ __forceinline__ double block_sum(double v, double* partials) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  if (lane == 0) partials[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(lane < warps ? partials[lane] : 0.0);
}

// The same for the maximum of bit patterns of magnitudes, which order as the magnitudes do, NaN on
// top. kAtomic is for kernels in which a warp arrives at another barrier without waiting there:
// compute-sanitizer's racecheck then loses sight of what __syncthreads says of that warp.
template <bool kAtomic = false>
__device__ __forceinline__ uint32_t block_max(uint32_t v, uint32_t* partials) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = __reduce_max_sync(0xFFFFFFFFu, v);
  if (lane == 0) {
    if constexpr (kAtomic) {
      atomicExch(&partials[threadIdx.x / 32], v);
    } else {
      partials[threadIdx.x / 32] = v;
    }
  }
  __syncthreads();
  uint32_t seen = 0;
  if (lane < warps) seen = kAtomic ? atomicMax(&partials[lane], 0u) : partials[lane];
  return __reduce_max_sync(0xFFFFFFFFu, seen);
}

__device__ __forceinline__ uint32_t magnitude_bits(float v) {
  return __float_as_uint(v) & 0x7FFFFFFFu;
}

}  // namespace prefixquant
