// SPDX-License-Identifier: Apache-2.0
//
// The kernel of hadamard.h for many rows of 16-bit inputs whose sums are compiled.
//
// Layout: a block is [inputs, segment], segment = min(pow2, 1024), inputs = k or pow2 / 1024.
//   `group` blocks at a time. Warps transform segments in registers (hadamard_tile.cuh) and put
//   them into shared memory as float32; after a barrier threads take columns, `inputs` values at
//   distance `segment` (hadamard_sums.cuh), and write the results of neighbouring columns side by
//   side.
// Grid: persistent CTAs of 256 or 384 threads that walk over the groups.
// Smem: 4 bytes an element of the group. Vectors of 8 floats are split in two halves, all first
//   halves before all second ones: consecutive lanes then store consecutive 16 bytes. The second
//   halves are shifted by 64 bytes within 128, so that a column read finds the two halves in
//   different banks.
// Limits: 8 divides the segment and cols, rows start at multiples of 16 bytes.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/hadamard_registers.cuh"
#include "prefixquant/hadamard_sums.cuh"
#include "prefixquant/row_reduce.cuh"

namespace prefixquant {

// ---- where things are in shared memory ----

// By name, not through a pointer that is passed around: the accesses stay shared-memory accesses.
__device__ __forceinline__ float4* column_smem() {
  extern __shared__ float4 columns_smem[];
  return columns_smem;
}

struct ColumnStorage {
  uint32_t vectors;   // of 8 floats, rounded up to 8
  uint32_t half_xor;  // 4: second halves are shifted; 0 where a segment is too short for it

  __device__ __forceinline__ ColumnStorage(int elements, int log2_columns) {
    vectors = (elements / 8 + 7) / 8 * 8;
    half_xor = log2_columns >= 6 ? 4 : 0;
  }
  // Index in column_smem() of the first (0) or second (1) half of a vector.
  __device__ __forceinline__ uint32_t half(uint32_t vector, uint32_t which) const {
    return which * vectors + (vector ^ (which * half_xor));
  }
};

// ---- first half: segments ----

// Where vector `flat` of the group's blocks lies in x and in up.
struct GroupOrigin {
  int64_t row;     // of the first block
  uint32_t block;  // of the first block, in its row
};

__device__ __forceinline__ longlong2 vector_offset(const HadamardArgs& p, const GroupOrigin& origin,
                                                   uint32_t flat) {
  uint32_t vector = flat, block = origin.block;
  int64_t row = origin.row;
  if (p.group > 1) {
    const uint32_t u = p.vectors_per_block.divide(flat);
    vector -= u * p.vectors_per_block.divisor;
    const uint32_t rows = p.blocks_per_row.divide(block + u);
    block = block + u - rows * p.blocks_per_row.divisor;
    row += rows;
  }
  const int64_t column = static_cast<int64_t>(block) * p.block_size + 8 * vector;
  return {row * p.x_stride + column, row * p.up_stride + column};
}

__device__ __forceinline__ void store_vector(const float (&v)[8], const ColumnStorage& storage,
                                             uint32_t flat) {
  column_smem()[storage.half(flat, 0)] = make_float4(v[0], v[1], v[2], v[3]);
  column_smem()[storage.half(flat, 1)] = make_float4(v[4], v[5], v[6], v[7]);
}

// kSegment: the length of the segments where every tile lies in one block, never cut; otherwise 0.
template <bool kSwiglu, int kVectors, int kSegment>
__device__ __forceinline__ void transform_segments(const HadamardArgs& p,
                                                   const ColumnStorage& storage,
                                                   const GroupOrigin& origin, uint32_t blocks) {
  const uint32_t count = blocks * p.vectors_per_block.divisor;
  const int lane = threadIdx.x % 32;
  const uint32_t step = blockDim.x * kVectors;
  for (uint32_t tile = threadIdx.x / 32 * 32 * kVectors; tile < count; tile += step) {
    RawTile<kSwiglu, kVectors> raw;
    if constexpr (kSegment > 0) {
      const longlong2 at = vector_offset(p, origin, tile);
      const uint16_t* x = p.x + at.x + 8 * lane;
      const uint16_t* up = p.up + at.y + 8 * lane;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) raw.load(i, x + 256 * i, up + 256 * i);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t flat = tile + 32 * i + lane;
        raw.clear(i);
        if (flat < count) {
          const longlong2 at = vector_offset(p, origin, flat);
          raw.load(i, p.x + at.x, p.up + at.y);
        }
      }
    }
    float v[kVectors][8];
    raw.values(p.is_bfloat16, v);
    transform_tile<kSegment>(v, p.columns, lane);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t flat = tile + 32 * i + lane;
      if (kSegment > 0 || flat < count) store_vector(v[i], storage, flat);
    }
  }
}

// kShort: segments of less than 512. A kernel of its own, as without SwiGLU: each path beside would
// take registers from the others.
template <bool kSwiglu, bool kShort>
__device__ __forceinline__ void transform_segments(const HadamardArgs& p,
                                                   const ColumnStorage& storage,
                                                   const GroupOrigin& origin, uint32_t blocks) {
  if constexpr (!kShort) {
    if (p.columns == 512) {
      transform_segments<kSwiglu, 2, 512>(p, storage, origin, blocks);
    } else {
      transform_segments<kSwiglu, 4, 1024>(p, storage, origin, blocks);
    }
  } else if (p.columns == 256 && p.block_size % 512 == 0) {
    transform_segments<kSwiglu, 2, 256>(p, storage, origin, blocks);
  } else if (p.columns == 128 && p.block_size % 512 == 0) {
    transform_segments<kSwiglu, 2, 128>(p, storage, origin, blocks);
  } else {
    transform_segments<kSwiglu, 2, 0>(p, storage, origin, blocks);
  }
}

// Where a block lies in x and in up.
__device__ __forceinline__ longlong2 block_offset(const HadamardArgs& p, uint32_t block) {
  const uint32_t r = p.blocks_per_row.divide(block);
  const int64_t row = r, column = int64_t{block - r * p.blocks_per_row.divisor} * p.block_size;
  return {row * p.x_stride + column, row * p.up_stride + column};
}

// The inputs of a group's blocks; one lane a block.
__device__ __forceinline__ void prefetch_group(const HadamardArgs& p, uint32_t first) {
  const uint32_t block = first + threadIdx.x;
  if (threadIdx.x >= p.group || block >= static_cast<uint32_t>(p.blocks)) return;
  const longlong2 at = block_offset(p, block);
  prefetch_l2(p.x + at.x, 2 * p.block_size);
  if (p.up) prefetch_l2(p.up + at.y, 2 * p.block_size);
}

// ---- second half: columns ----

// Word i of the matrix as it lies in memory, four signs a word.
template <int K>
constexpr uint32_t sign_word(int i) {
  uint32_t word = 0;
  for (int b = 0; b < 4; ++b) {
    word |= (kSignMatrix<K>.minus[4 * i / K][4 * i % K + b] ? 0xFFu : 0x01u) << (8 * b);
  }
  return word;
}

// NOTES: every word is a constant expression of its own. A table that a constexpr constructor fills
// in a loop compiles without a warning and is all zeros on the device.
template <int K, typename Indices = std::make_integer_sequence<int, K * K / 4>>
struct SignWords;
template <int K, int... I>
struct SignWords<K, std::integer_sequence<int, I...>> {
  uint32_t words[K * K / 4] = {std::integral_constant<uint32_t, sign_word<K>(I)>::value...};
};
template <int K>
__device__ const SignWords<K> kExpectedSigns;

// The signs are those that the kernel was compiled for. All threads of the block.
// NOTES: of a vote on a constant the compiler makes another one where the result is used, in a loop
// that not all threads need to enter.
template <int K>
__device__ __forceinline__ bool signs_match(const int8_t* signs) {
  if constexpr (K == 1) {
    return true;
  } else {
    bool same = true;
    const uint32_t* given = reinterpret_cast<const uint32_t*>(signs);
#pragma unroll 8
    for (int i = threadIdx.x; i < K * K / 4; i += blockDim.x) {
      same = same && given[i] == kExpectedSigns<K>.words[i];
    }
    return __syncthreads_and(same);
  }
}

// offset += step, opaque to the compiler: it would keep every multiple of the step, an invariant of
// the loops around, in a register.
__device__ __forceinline__ void advance(uint32_t& offset, uint32_t step) {
  offset += step;
  asm("" : "+r"(offset));
}

// Writes the columns' results, rounded; `at` is where output 0 goes, from `out` on. kShare: CTAs
// that share a segment.
template <int kShare, int kColumns, int kOutputs>
__device__ __forceinline__ void store_rounded(const float (&y)[kColumns][kOutputs],
                                              const HadamardArgs& p, uint16_t* out, uint32_t at) {
#pragma unroll
  for (int i = 0; i < kOutputs; ++i, advance(at, kShare * p.columns)) {
    const float second = y[kColumns - 1][i];
    const uint32_t pair = p.is_bfloat16 ? pack_pair(y[0][i], second, __nv_bfloat16{})
                                        : pack_pair(y[0][i], second, __half{});
    if constexpr (kColumns == 2) {
      *reinterpret_cast<uint32_t*>(out + at) = pair;
    } else {
      out[at] = static_cast<uint16_t>(pair);
    }
  }
}

// The same, quantized. NaNs, which are rare, are looked for once for four levels.
template <int kShare, int kColumns, int kOutputs>
__device__ __forceinline__ void store_levels(const float (&y)[kColumns][kOutputs],
                                             const HadamardArgs& p, const Quantizer& quantizer,
                                             int8_t* out, uint32_t at) {
  constexpr int kStep = 4 / kColumns;
#pragma unroll
  for (int first = 0; first < kOutputs; first += kStep) {
    uint32_t t[kStep][kColumns], marks = 0;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
#pragma unroll
      for (int c = 0; c < kColumns && first + i < kOutputs; ++c) {
        marks |= t[i][c] = rounded_bits(y[c][first + i], quantizer);
      }
    }
    if (marks & kNanMark) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns && first + i < kOutputs; ++c) {
          if (t[i][c] & kNanMark) t[i][c] = 0;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStep && first + i < kOutputs; ++i, advance(at, kShare * p.columns)) {
      if constexpr (kColumns == 2) {
        *reinterpret_cast<uint16_t*>(out + at) =
            static_cast<uint16_t>(__byte_perm(t[i][0], t[i][1], 0x0040));
      } else {
        out[at] = static_cast<int8_t>(t[i][0]);
      }
    }
  }
}

// The sums with signs that are not the compiled ones; slow, and the same order of additions.
template <typename Sums, typename Load>
__device__ void sum_with_given_signs(float (&acc)[Sums::kColumns][Sums::kOutputs],
                                     const int8_t* signs, Load& load) {
  constexpr int K = Sums::kInputs;
#pragma unroll
  for (int i = 0; i < Sums::kOutputs; ++i) {
    const int8_t* row = signs + i * K;
    float total[Sums::kColumns] = {};
#pragma unroll 1
    for (int j = 0; j < K; j += 4) {
      float x[4][Sums::kColumns];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        load(j + b, x[b]);
#pragma unroll
        for (int c = 0; c < Sums::kColumns; ++c) x[b][c] = row[j + b] < 0 ? -x[b][c] : x[b][c];
      }
#pragma unroll
      for (int c = 0; c < Sums::kColumns; ++c) {
        total[c] = __fadd_rn(total[c],
                             __fadd_rn(__fadd_rn(x[0][c], x[1][c]), __fadd_rn(x[2][c], x[3][c])));
      }
    }
#pragma unroll
    for (int c = 0; c < Sums::kColumns; ++c) acc[c][i] = total[c];
  }
}

// What becomes of the outputs of block u's columns from `column` on before they are stored:
// nothing.
struct StoreOutputs {
  static constexpr bool kStaticLevels = false;  // whether the results are levels of a static scale
  template <int kColumns, int kOutputs>
  __device__ __forceinline__ void operator()(float (&)[kColumns][kOutputs], uint32_t /* u */,
                                             uint32_t /* column */) const {}
};

// All columns of this thread's warps; `largest` collects the magnitudes where `maximum`, otherwise
// the results are stored, behind `behind`. The CTA is number `rank` of the kShare that share a
// segment.
template <typename Sums, int kShare = 1, typename Behind = StoreOutputs>
__device__ __forceinline__ void finish_columns(const HadamardArgs& p, const ColumnStorage& storage,
                                               int64_t first_block, uint32_t blocks,
                                               const Quantizer& quantizer, bool compiled_signs,
                                               bool maximum, uint32_t& largest, uint32_t rank = 0,
                                               const Behind& behind = {}) {
  constexpr int kColumns = Sums::kColumns;
  const uint32_t step = blockDim.x * kColumns;
  const uint32_t columns = blocks << p.log2_columns, width = p.columns;
  const int64_t first_element = first_block * p.block_size;
  for (uint32_t c = threadIdx.x * kColumns; c < columns; c += step) {
    const uint32_t u = c >> p.log2_columns, column = c & (width - 1);
    const uint32_t first = ((u * Sums::kInputs) << p.log2_columns) + column;
    // Where half_xor is not 0, the columns are a multiple of 8 vectors and steps keep the shift.
    const uint32_t start = 4 * storage.half(first / 8, first / 4 % 2) + first % 4;
    uint32_t from = start;
    auto load = [&](int n, float (&x)[kColumns]) {
      if (n == 0) from = start;
      const float* values = reinterpret_cast<const float*>(column_smem());
      if constexpr (kColumns == 2) {
        const float2 v = *reinterpret_cast<const float2*>(values + from);
        x[0] = v.x;
        x[1] = v.y;
      } else {
        x[0] = values[from];
      }
      advance(from, width / 2);
    };
    float y[kColumns][Sums::kOutputs];
    if (compiled_signs) {
      Sums::sum(y, load);
    } else if constexpr (Sums::K > 1) {
      sum_with_given_signs<Sums>(y, p.signs, load);
    }
#pragma unroll
    for (int i = 0; i < Sums::kOutputs; ++i) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        // + 0: a sum that started at +0 is never -0.
        y[k][i] = Sums::K > 1 ? __fmaf_rn(y[k][i], p.norm, 0.0f) : __fmul_rn(y[k][i], p.norm);
      }
    }
    behind(y, u, column);
    const uint32_t at = u * p.block_size + rank * width + column;
    if constexpr (Behind::kStaticLevels) {
      store_levels<kShare>(y, p, quantizer, static_cast<int8_t*>(p.out) + first_element, at);
    } else if (maximum) {
#pragma unroll
      for (int i = 0; i < Sums::kOutputs; ++i) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) largest = max(largest, magnitude_bits(y[k][i]));
      }
    } else if (p.scaling == RowScale::kNone) {
      store_rounded<kShare>(y, p, static_cast<uint16_t*>(p.out) + first_element, at);
    } else {
      store_levels<kShare>(y, p, quantizer, static_cast<int8_t*>(p.out) + first_element, at);
    }
  }
}

template <typename Sums, int kCtasPerSm, bool kSwiglu, bool kShort>
__global__ void __launch_bounds__(hadamard_sums_threads(kCtasPerSm),
                                  kCtasPerSm* kHadamardThreads / hadamard_sums_threads(kCtasPerSm))
    hadamard_sums_kernel(const HadamardArgs p) {
  __shared__ uint32_t maxima[32];
  const ColumnStorage storage(p.group * p.block_size, p.log2_columns);
  grid_dependency_launch();
  const bool compiled_signs = signs_match<Sums::K>(p.signs);
  // Before the wait: L2 is where the writes of the kernel before arrive, nothing there is stale.
  prefetch_group(p, blockIdx.x * p.group);
  grid_dependency_wait();

  const uint32_t all_blocks = static_cast<uint32_t>(p.blocks), step = gridDim.x * p.group;
  for (uint32_t first = blockIdx.x * p.group; first < all_blocks; first += step) {
    const uint32_t blocks = min(static_cast<uint32_t>(p.group), all_blocks - first);
    const uint32_t row = p.blocks_per_row.divide(first);
    const GroupOrigin origin{row, first - row * p.blocks_per_row.divisor};
    transform_segments<kSwiglu, kShort>(p, storage, origin, blocks);
    __syncthreads();
    prefetch_group(p, first + step);

    Quantizer quantizer{1.0f, p.qmin, p.qmax};
    if (p.scaling == RowScale::kStatic) quantizer.inv_scale = __fdiv_rn(1.0f, *p.scale);
    uint32_t largest = 0;
    // Dynamic scales: the sums once for the largest magnitude, once more for the levels.
    for (bool maximum = p.scaling == RowScale::kDynamic;; maximum = false) {
      finish_columns<Sums>(p, storage, first, blocks, quantizer, compiled_signs, maximum, largest);
      if (!maximum) break;
      largest = block_max(largest, maxima);
      const float scale = dynamic_scale(__uint_as_float(largest), p.qmax, 1.0f);
      if (threadIdx.x == 0) p.row_scale[origin.row] = scale;
      quantizer.inv_scale = __fdiv_rn(1.0f, scale);
    }
    __syncthreads();  // before the next group overwrites the columns
  }
}

// ---- the compiled sums ----

using HadamardSumsKernel = void (*)(HadamardArgs);

// Defined in hadamard_instance.cuh, instantiated once each in src/inst/hadamard_*.cu.
// For segments of `columns`.
template <typename Sums, int kCtasPerSm, int kShortCtas>
HadamardSumsKernel hadamard_sums_instance(bool swiglu, int columns);

}  // namespace prefixquant
