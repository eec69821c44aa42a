// SPDX-License-Identifier: Apache-2.0
//
// What happens to a GEMM's int32 accumulators on their way out: dequantization, bias, SwiGLU,
// residual add, static quantization. Shared by every GEMM kernel; the formulas are in gemm_w4.h.
// Each float32 operation is rounded on its own (no contraction into FMA), so that the GPU kernels,
// the CPU kernels and the reference agree bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "prefixquant/gemm_w4.h"

namespace prefixquant {

// The part of GemmW4Params that the epilogue reads.
struct EpilogueArgs {
  const float* weight_scale;  // [N]
  const float* input_scale;   // []
  const void* bias;           // [N] in bias_dtype, may be nullptr
  GemmDtype bias_dtype;
  void* out;  // [M, N_out]
  int64_t out_row_stride;
  GemmDtype out_dtype;
  bool swiglu;
  const void* residual;  // [M, N_out] in out_dtype, may be nullptr
  int64_t residual_row_stride;
  const float* output_scale;  // [], may be nullptr
  int output_qmin;
  int output_qmax;
  int m;
  int n;
  bool vectors;  // rows of out and residual are aligned for the widest access
};

// The widest accesses are 8 values of out and of residual (4 of them with SwiGLU).
inline bool epilogue_rows_are_aligned(const GemmW4Params& p) {
  const int64_t bytes = p.output_scale != nullptr ? 1 : 2;
  const auto aligned = [](const void* pointer, int64_t stride_bytes) {
    return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
  };
  return aligned(p.out, p.out_row_stride * bytes) &&
         (p.residual == nullptr || aligned(p.residual, p.residual_row_stride * 2));
}

inline EpilogueArgs make_epilogue_args(const GemmW4Params& p) {
  return {p.weight_scale,
          p.input_scale,
          p.bias,
          p.bias_dtype,
          p.out,
          p.out_row_stride,
          p.out_dtype,
          p.swiglu,
          p.residual,
          p.residual_row_stride,
          p.output_scale,
          p.output_qmin,
          p.output_qmax,
          p.m,
          p.n,
          epilogue_rows_are_aligned(p)};
}

__device__ __forceinline__ float load_as_float(const void* array, GemmDtype dtype, int64_t index) {
  switch (dtype) {
    case GemmDtype::kFloat16:
      return __half2float(static_cast<const __half*>(array)[index]);
    case GemmDtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(array)[index]);
    default:
      return static_cast<const float*>(array)[index];
  }
}

// Two floats rounded to a pair of 16-bit values (the first one in the low half).
template <bool kIsBf16>
__device__ __forceinline__ uint32_t pack_16bit(float low, float high) {
  if constexpr (kIsBf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ float2 unpack_16bit(uint32_t pair, bool is_bf16) {
  if (is_bf16) return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ uint32_t pack_16bit(float low, float high, bool is_bf16) {
  return is_bf16 ? pack_16bit<true>(low, high) : pack_16bit<false>(low, high);
}

// x * sigmoid(x), within 4 ulp of float32. For very negative x the denominator overflows and the
// quotient is zero, as it should be.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ int quantize_to_int(float y, float reciprocal_scale, int qmin,
                                               int qmax) {
  const int q = __float2int_rn(__fmul_rn(y, reciprocal_scale));
  return min(max(q, qmin), qmax);
}

// Finishes eight consecutive channels of one token and stores them.
//   pairs: y[channel .. channel + 7] already rounded to out_dtype, two to a word
//   channel: a multiple of 8, < n      token: < m
// Where rows are not aligned, and at the edge, elements go one by one, never past channel n.
__device__ __forceinline__ void finish_and_store_8(const EpilogueArgs& args, uint4 pairs,
                                                   int channel, int token) {
  const bool is_bf16 = args.out_dtype == GemmDtype::kBFloat16;
  uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
  int count = min(8, args.n - channel);  // values still alive in `words`
  int64_t out_channel = channel;
  if (args.swiglu) {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 gate_up = unpack_16bit(words[i], is_bf16);
      y[i] = __fmul_rn(silu(gate_up.x), gate_up.y);
    }
    words[0] = pack_16bit(y[0], y[1], is_bf16);
    words[1] = pack_16bit(y[2], y[3], is_bf16);
    out_channel = channel / 2;
    count /= 2;
  }
  if (args.residual != nullptr) {
    const int64_t offset = token * args.residual_row_stride + out_channel;
    const uint16_t* residual = static_cast<const uint16_t*>(args.residual) + offset;
    uint32_t addend[4] = {0, 0, 0, 0};
    if (args.vectors && count == 8) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(residual);
      addend[0] = loaded.x, addend[1] = loaded.y, addend[2] = loaded.z, addend[3] = loaded.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) addend[i / 2] |= uint32_t{residual[i]} << (i % 2 * 16);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 r = unpack_16bit(addend[i], is_bf16);
      const float2 y = unpack_16bit(words[i], is_bf16);
      words[i] = pack_16bit(__fadd_rn(y.x, r.x), __fadd_rn(y.y, r.y), is_bf16);
    }
  }
  const int64_t offset = token * args.out_row_stride + out_channel;
  if (args.output_scale != nullptr) {
    const float reciprocal = __frcp_rn(__ldg(args.output_scale));
    uint32_t q[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 y = unpack_16bit(words[i], is_bf16);
      const int low = quantize_to_int(y.x, reciprocal, args.output_qmin, args.output_qmax);
      const int high = quantize_to_int(y.y, reciprocal, args.output_qmin, args.output_qmax);
      q[i / 2] |= ((low & 0xFF) | (high & 0xFF) << 8) << (i % 2 * 16);
    }
    int8_t* out = static_cast<int8_t*>(args.out) + offset;
    if (args.vectors && count == 8) {
      *reinterpret_cast<uint2*>(out) = make_uint2(q[0], q[1]);
    } else if (args.vectors && count == 4) {
      *reinterpret_cast<uint32_t*>(out) = q[0];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) out[i] = static_cast<int8_t>(q[i / 4] >> (i % 4 * 8));
    }
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(args.out) + offset;
  if (args.vectors && count == 8) {
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
  } else if (args.vectors && count == 4) {
    *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) out[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
}

}  // namespace prefixquant
