// SPDX-License-Identifier: Apache-2.0
// The bricks of the mma.sync kernel (gemm_w4_mma.cuh): geometry, one unit of 16 rows x 64 k times
// the tokens, the copy of activations, partial sums, the store.
//
// Orientation: D^T = W X^T. The weights are the 16-row operand A, read from global memory straight
// into the registers of their fragments; the tokens are the 8-column operand B, read from shared
// memory by ldmatrix.
//
// int4 weights are unpacked as 16 w (layout_w4.h), so the sums are 16 times too large; the shift
// back is exact. |sum| <= 16 * 8 * 128 * k < 2^31 bounds k by 131071. Partial sums are int32 and
// exact, so no order of reduction can change a result: every split along k is deterministic.
#pragma once

#include <cuda_runtime.h>

#include "prefixquant/cp_async.cuh"
#include "prefixquant/epilogue.cuh"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/int4.cuh"
#include "prefixquant/layout_w4.h"
#include "prefixquant/mma.cuh"

namespace prefixquant {

// Compile-time geometry of one kernel.
template <int WeightBits,  // 4 or 8
          int TokenTiles,  // 8-token tiles of a CTA: 1, 2, 4, 8 or 16
          int RowTiles,    // 16-row tiles of a warp
          int RowWarps,    // warps along the rows
          int KWarps,      // warps along k, interleaved by one unit
          int Stages,      // units in flight per warp and row tile, in registers
          bool NibbleMma>  // multiply in int4 (sm_80/86/89): activations must be in [-8, 7]
struct MmaGeometry {
  static constexpr int kWeightBits = WeightBits;
  static constexpr int kTokenTiles = TokenTiles;
  static constexpr int kRowTiles = RowTiles;
  static constexpr int kRowWarps = RowWarps;
  static constexpr int kKWarps = KWarps;
  static constexpr int kStages = Stages;
  static constexpr bool kNibbleMma = NibbleMma;
  static constexpr int kThreads = 32 * RowWarps * KWarps;
  static constexpr int kRows = 16 * RowTiles * RowWarps;  // output channels of a CTA tile
  static constexpr int kTokens = 8 * TokenTiles;          // tokens of a CTA tile
  static constexpr int kLoads = WeightBits / 4;           // 16-byte loads per lane and unit
  static constexpr int kShift = (WeightBits == 4 && !NibbleMma) ? 4 : 0;
  // The four token pairs 2t of a fragment, each with eight rows g, must fall in distinct banks:
  // 2 kPartialStride = 8 modulo 32.
  static constexpr int kPartialStride = kRows + 4;

  static_assert(WeightBits == 4 || WeightBits == 8);
  static_assert(TokenTiles == 1 || TokenTiles == 2 || TokenTiles == 4 || TokenTiles == 8 ||
                TokenTiles == 16);
  static_assert(!NibbleMma || WeightBits == 4, "int4 MMA needs int4 weights");
  static_assert(kThreads <= 1024 && 2 * kThreads % kRows == 0, "one row pair a thread");
};

inline constexpr int kUnitK = 64;
inline constexpr int kVectorsPerBlock = kFragmentBlockBytes / 16;

// Bytes of one token's row of an activation buffer that holds `k` values: the 16 extra bytes move
// the eight rows of an ldmatrix to distinct banks, whether k is an odd or an even multiple of 64.
__host__ __device__ constexpr int activation_row_bytes(int k) { return k + 16; }

__host__ __device__ constexpr int units_of(int k) { return (k + kUnitK - 1) / kUnitK; }

// This lane's first 16 bytes of the unit (row tile, unit) of the prepacked weights. A fragment
// block of the layout is 4 row tiles x 1 unit; with int8 weights a unit is two blocks.
template <class G>
__device__ __forceinline__ const uint4* unit_address(const void* weight, int64_t row_tile, int unit,
                                                     int k) {
  const int row_units = (k + kPackK - 1) / kPackK * (kPackK / kUnitK);
  const int64_t block = (row_tile / 4 * row_units + unit) * G::kLoads;
  return static_cast<const uint4*>(weight) + block * kVectorsPerBlock + row_tile % 4 * 32 +
         threadIdx.x % 32;
}

template <class G>
__device__ __forceinline__ void load_unit_if(uint4 (&w)[G::kLoads], const uint4* address,
                                             bool wanted) {
#pragma unroll
  for (int i = 0; i < G::kLoads; ++i)
    load_streaming_16_if(w[i], address + i * kVectorsPerBlock, wanted);
}

// The A registers of a unit, [k32 step][register].
template <class G>
__device__ __forceinline__ void unpack_unit(uint32_t (&a)[2][4], const uint4 (&w)[G::kLoads]) {
  const uint32_t first[4] = {w[0].x, w[0].y, w[0].z, w[0].w};
  const uint4& last = w[G::kLoads - 1];
  const uint32_t second[4] = {last.x, last.y, last.z, last.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[0][i] = G::kWeightBits == 4 ? unpack_low_nibbles_16x(first[i]) : first[i];
    a[1][i] = G::kWeightBits == 4 ? unpack_high_nibbles_16x(first[i]) : second[i];
  }
}

// The warp's sums += one unit of each of its row tiles x the CTA's tokens.
template <class G>
__device__ __forceinline__ void multiply_unit(
    int32_t (&sums)[G::kRowTiles][G::kTokenTiles][4],
    const uint4 (&w)[G::kRowTiles][G::kLoads],  // as loaded
    uint32_t x_smem,                            // shared address of this unit's 64 k, token 0
    const uint32_t (&x_row_offset)[G::kTokenTiles]) {  // bytes to this lane's ldmatrix row
  uint32_t a[G::kRowTiles][2][4];
  if constexpr (!G::kNibbleMma) {
#pragma unroll
    for (int r = 0; r < G::kRowTiles; ++r) unpack_unit<G>(a[r], w[r]);
  }
#pragma unroll
  for (int j = 0; j < G::kTokenTiles; ++j) {
    uint32_t b[4];
    ldmatrix_x4(b, x_smem + x_row_offset[j]);
    if constexpr (G::kNibbleMma) {
      // A byte of the weights holds k and k + 32. Activations paired alike meet them, and the order
      // of k inside a product does not matter: no weight is unpacked at all.
      const uint32_t b0 = (b[0] & 0x0F0F0F0Fu) | ((b[2] << 4) & 0xF0F0F0F0u);
      const uint32_t b1 = (b[1] & 0x0F0F0F0Fu) | ((b[3] << 4) & 0xF0F0F0F0u);
#pragma unroll
      for (int r = 0; r < G::kRowTiles; ++r)
        mma_m16n8k64_s4(sums[r][j], w[r][0].x, w[r][0].y, w[r][0].z, w[r][0].w, b0, b1);
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int r = 0; r < G::kRowTiles; ++r)
          mma_m16n8k32_s8(sums[r][j], a[r][step][0], a[r][step][1], a[r][step][2], a[r][step][3],
                          b[2 * step], b[2 * step + 1]);
      }
    }
  }
}

// Bytes from token 0 to the row this lane addresses in the ldmatrix of each token tile. Rows past
// the last token repeat it: their products land in columns that are never stored.
template <class G>
__device__ __forceinline__ void activation_row_offsets(uint32_t (&offset)[G::kTokenTiles],
                                                       int tokens, int row_bytes) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < G::kTokenTiles; ++j)
    offset[j] = min(8 * j + lane % 8, tokens - 1) * row_bytes + (lane / 8) * 16;
}

// Starts the copy of x[0 .. tokens)[k_begin .. k_begin + k_count) to shared memory, k_count > 0.
// Values at and past k, the padding of the weights, become zero without being read.
template <class G>
__device__ __forceinline__ void fetch_activations(uint32_t x_smem, int row_bytes, const int8_t* x,
                                                  int64_t x_row_stride, int tokens, int k_begin,
                                                  int k_count, int k) {
  // The index (token, vector) walks by kThreads vectors; one division, then additions.
  const int vectors = k_count / 16;
  const int token_step = G::kThreads / vectors, vector_step = G::kThreads % vectors;
  int token = threadIdx.x / vectors, vector = threadIdx.x % vectors;
  while (token < tokens) {
    const int k_here = k_begin + 16 * vector;
    const int valid_bytes = min(max(k - k_here, 0), 16);
    cp_async_16(x_smem + token * row_bytes + 16 * vector,
                valid_bytes > 0 ? x + token * x_row_stride + k_here : x, valid_bytes);
    token += token_step;
    vector += vector_step;
    if (vector >= vectors) {
      vector -= vectors;
      ++token;
    }
  }
}

// Writes the warp's sums, shifted back, to its k-warp's slab of partial sums [tokens][rows + 4].
template <class G>
__device__ __forceinline__ void store_partial_sums(
    int32_t* slab, const int32_t (&sums)[G::kRowTiles][G::kTokenTiles][4], int tokens,
    int row_warp) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < G::kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < G::kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 8 * j + 2 * t + (c & 1);
        const int row = 16 * (row_warp * G::kRowTiles + r) + g + 8 * (c >> 1);
        if (token < tokens) slab[token * G::kPartialStride + row] = sums[r][j][c] >> G::kShift;
      }
    }
  }
}

// The sum over the k-warps' slabs of one row pair; `slab_size` in values.
template <class G>
__device__ __forceinline__ int2 sum_partial_pair(const int32_t* pair, int slab_size) {
  int2 sum = *reinterpret_cast<const int2*>(pair);
#pragma unroll
  for (int w = 1; w < G::kKWarps; ++w) {
    const int2 addend = *reinterpret_cast<const int2*>(pair + w * slab_size);
    sum.x += addend.x;
    sum.y += addend.y;
  }
  return sum;
}

// The factors of two neighbouring channels. They are loaded while the weights are on their way and
// multiplied where they are used: a product up there would hold the main loop until the slowest of
// them has come, behind the weights in memory.
struct ScalePair {
  float input, first, second;
  __device__ __forceinline__ float2 product() const {
    return {__fmul_rn(input, first), __fmul_rn(input, second)};
  }
};

__device__ __forceinline__ ScalePair load_scale_pair(const EpilogueArgs& p, int channel) {
  ScalePair scale = {0.f, 0.f, 0.f};
  if (p.out_dtype != GemmDtype::kInt32 && channel < p.n) {
    scale.input = load_constant_float(p.input_scale);
    scale.first = load_constant_float(p.weight_scale + channel);
    if (channel + 1 < p.n) scale.second = load_constant_float(p.weight_scale + channel + 1);
  }
  return scale;
}

__device__ __forceinline__ float round_to(GemmDtype dtype, float y) {
  if (dtype == GemmDtype::kFloat16) return __half2float(__float2half_rn(y));
  if (dtype == GemmDtype::kBFloat16) return __bfloat162float(__float2bfloat16_rn(y));
  return y;
}

// One finished value: residual, then quantized or as it is.
__device__ __forceinline__ void finish_and_store_value(const EpilogueArgs& p, float y,
                                                       int64_t out_channel, int64_t token) {
  if (p.residual != nullptr) {
    const float r =
        load_as_float(p.residual, p.out_dtype, token * p.residual_row_stride + out_channel);
    y = round_to(p.out_dtype, __fadd_rn(y, r));
  }
  const int64_t at = token * p.out_row_stride + out_channel;
  if (p.output_scale != nullptr) {
    static_cast<int8_t*>(p.out)[at] = static_cast<int8_t>(
        quantize_to_int(y, __frcp_rn(__ldg(p.output_scale)), p.output_qmin, p.output_qmax));
  } else if (p.out_dtype == GemmDtype::kFloat32) {
    static_cast<float*>(p.out)[at] = y;
  } else if (p.out_dtype == GemmDtype::kBFloat16) {
    static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(y);
  } else {
    static_cast<__half*>(p.out)[at] = __float2half_rn(y);
  }
}

// The whole epilogue of gemm_w4.h on channels (channel, channel + 1), channel even, of one token.
// Out of line: inlined it is ten times the main loop, and fetching that code cost a GEMV 20 %
// (57344 x 8192, H100).
inline __device__ __noinline__ void finish_and_store_pair_fused(const EpilogueArgs& p, int2 sum,
                                                                float2 scale, int channel,
                                                                int64_t token) {
  const int count = min(2, p.n - channel);
  const int sums[2] = {sum.x, sum.y};
  const float scales[2] = {scale.x, scale.y};
  float y[2] = {0.f, 0.f};
  for (int i = 0; i < count; ++i) {
    if (p.out_dtype == GemmDtype::kInt32) {
      static_cast<int32_t*>(p.out)[token * p.out_row_stride + channel + i] = sums[i];
    } else {
      y[i] = __fmul_rn(static_cast<float>(sums[i]), scales[i]);
      if (p.bias != nullptr)
        y[i] = __fadd_rn(y[i], load_as_float(p.bias, p.bias_dtype, channel + i));
      y[i] = round_to(p.out_dtype, y[i]);
    }
  }
  if (p.out_dtype == GemmDtype::kInt32) return;
  if (p.swiglu) {
    y[0] = round_to(p.out_dtype, __fmul_rn(silu(y[0]), y[1]));
    finish_and_store_value(p, y[0], channel / 2, token);
  } else {
    for (int i = 0; i < count; ++i) finish_and_store_value(p, y[i], channel + i, token);
  }
}

// Whether the epilogue is nothing but a scale and a 16-bit rounding, pairs aligned.
inline bool epilogue_is_plain(const EpilogueArgs& p) {
  return (p.out_dtype == GemmDtype::kFloat16 || p.out_dtype == GemmDtype::kBFloat16) &&
         p.bias == nullptr && !p.swiglu && p.residual == nullptr && p.output_scale == nullptr &&
         p.n % 2 == 0 && p.out_row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % 4 == 0;
}

__device__ __forceinline__ void finish_and_store_pair(const EpilogueArgs& p, bool plain, int2 sum,
                                                      float2 scale, int channel, int64_t token) {
  if (channel >= p.n) return;
  if (plain) {
    const uint32_t pair = pack_16bit(__fmul_rn(static_cast<float>(sum.x), scale.x),
                                     __fmul_rn(static_cast<float>(sum.y), scale.y),
                                     p.out_dtype == GemmDtype::kBFloat16);
    uint16_t* out = static_cast<uint16_t*>(p.out) + token * p.out_row_stride + channel;
    *reinterpret_cast<uint32_t*>(out) = pair;
  } else {
    finish_and_store_pair_fused(p, sum, scale, channel, token);
  }
}

}  // namespace prefixquant
