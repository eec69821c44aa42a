// SPDX-License-Identifier: Apache-2.0
//
// Hadamard transforms of any size 2^m k, dtype, alignment and sign matrix, for what hadamard.cuh
// does not cover.
//
// Grid: one CTA of 512 threads for `group` blocks (all blocks of a row where scales are dynamic).
// Smem: 4 bytes an element of the group; 60 < k < 512: and a block's factor. Every butterfly stage
//   goes through it.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/hadamard_integer.cuh"
#include "prefixquant/hadamard_tile.cuh"
#include "prefixquant/quantizer.cuh"
#include "prefixquant/row_reduce.cuh"
#include "prefixquant/row_vector.cuh"

namespace prefixquant {

inline constexpr int kHadamardGenericThreads = 512;

// The stages over the pow2 part of `count` values, which are there for all threads before and
// after.
__device__ __forceinline__ void generic_butterflies(float* values, int count, int pow2) {
  for (int h = 1; h < pow2; h *= 2) {
    for (int i = threadIdx.x; i < count / 2; i += kHadamardGenericThreads) {
      const int low = 2 * i - (i & (h - 1));
      const float a = values[low], b = values[low + h];
      values[low] = __fadd_rn(a, b);
      values[low + h] = __fsub_rn(a, b);
    }
    __syncthreads();
  }
}

// The integers of a block (hadamard_integer.cuh) in place of its values; the factor of its sums.
__device__ __forceinline__ float make_integers(float* values, int block, float norm,
                                               uint32_t* maxima) {
  float largest = 0.0f;
  for (int i = threadIdx.x; i < block; i += kHadamardGenericThreads) {
    largest = larger_magnitude(largest, values[i]);
  }
  const IntegerScale scale = integer_scale(block_max(magnitude_bits(largest), maxima), norm);
  for (int i = threadIdx.x; i < block; i += kHadamardGenericThreads) {
    values[i] = __int_as_float(integer_of(values[i], scale));
  }
  __syncthreads();
  return scale.factor;
}

// Output `index` of the group: the sum over the inputs of its column, times norm. `factors`: of the
// blocks, where their values are integers.
__device__ __forceinline__ float generic_output(const RowHadamardParams& p, const float* values,
                                                const float* factors, int index, int pow2,
                                                float norm) {
  const int k = static_cast<int>(p.k), block = static_cast<int>(p.block_size);
  if (k == 1) return __fmul_rn(values[index], norm);
  const int first = index / block * block, row = (index - first) / pow2;
  const float* column = values + first + (index - first) % pow2;
  const int8_t* signs = p.signs + row * k;
  if (hadamard_sums_are_integers(k)) {
    uint32_t sum = 0;  // wraps around where the block was not finite
    for (int j = 0; j < k; ++j) {
      const uint32_t x = __float_as_uint(column[j * pow2]);
      sum += signs[j] < 0 ? 0u - x : x;
    }
    return __fmul_rn(__int2float_rn(static_cast<int32_t>(sum)), factors[index / block]);
  }
  float total = 0.0f;
  for (int j = 0; j < k; j += 4) {
    float x[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float v = column[(j + b) * pow2];
      x[b] = signs[j + b] < 0 ? -v : v;
    }
    total = __fadd_rn(total, __fadd_rn(__fadd_rn(x[0], x[1]), __fadd_rn(x[2], x[3])));
  }
  return __fmul_rn(total, norm);
}

template <typename T>
__global__ void __launch_bounds__(kHadamardGenericThreads)
    hadamard_generic_kernel(const RowHadamardParams p, int group, float norm) {
  extern __shared__ float values[];
  __shared__ uint32_t maxima[32];
  grid_dependency_launch();
  grid_dependency_wait();
  const int block = static_cast<int>(p.block_size), pow2 = block / static_cast<int>(p.k);
  const int64_t blocks_per_row = p.cols / block, blocks = p.rows * blocks_per_row;
  const int64_t first_block = static_cast<int64_t>(blockIdx.x) * group;
  const int count =
      static_cast<int>(min(static_cast<int64_t>(group), blocks - first_block)) * block;

  for (int i = threadIdx.x; i < count; i += kHadamardGenericThreads) {
    const int64_t b = first_block + i / block, row = b / blocks_per_row;
    const int64_t column = b % blocks_per_row * block + i % block;
    float v = to_float(static_cast<const T*>(p.x)[row * p.x_stride + column]);
    if (p.up) {
      const float u = to_float(static_cast<const T*>(p.up)[row * p.up_stride + column]);
      v = __fmul_rn(silu_approximate(v), u);
    }
    values[i] = v;
  }
  __syncthreads();
  generic_butterflies(values, count, pow2);

  float* const factors = values + group * block;
  if (hadamard_sums_are_integers(p.k)) {
    for (int b = 0; b < count / block; ++b) {
      const float factor = make_integers(values + b * block, block, norm, maxima);
      if (threadIdx.x == 0) factors[b] = factor;
    }
    __syncthreads();
  }

  const int64_t at = first_block * block;
  if (p.scaling == RowScale::kNone) {
    for (int i = threadIdx.x; i < count; i += kHadamardGenericThreads) {
      static_cast<T*>(p.out)[at + i] =
          from_float<T>(generic_output(p, values, factors, i, pow2, norm));
    }
    return;
  }
  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if (p.scaling == RowScale::kStatic) {
    quantizer.inv_scale = __fdiv_rn(1.0f, *p.scale);
  } else {
    uint32_t largest = 0;
    for (int i = threadIdx.x; i < count; i += kHadamardGenericThreads) {
      largest = max(largest, magnitude_bits(generic_output(p, values, factors, i, pow2, norm)));
    }
    largest = block_max(largest, maxima);
    const float scale = dynamic_scale(__uint_as_float(largest), p.qmax, 1.0f);
    if (threadIdx.x == 0) p.row_scale[first_block / blocks_per_row] = scale;
    quantizer.inv_scale = __fdiv_rn(1.0f, scale);
  }
  for (int i = threadIdx.x; i < count; i += kHadamardGenericThreads) {
    static_cast<int8_t*>(p.out)[at + i] =
        quantize(generic_output(p, values, factors, i, pow2, norm), quantizer);
  }
}

}  // namespace prefixquant
