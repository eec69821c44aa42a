// SPDX-License-Identifier: Apache-2.0
// The end of the low-bit GEMM: tiles of raw int32 sums to pieces of the rows of y.
//
// Computes acc = sum - correction;  y = float(acc) * scale[n] (+ bias[n]), each operation rounded
// to float32 on its own, then rounded to the output dtype; int32 output is acc itself.
#pragma once

#include "../gemm_params.h"
#include "isa_namespace.h"
#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

constexpr int64_t kMaxBlocks = 4;  // blocks of 16 outputs that one tile may have

// The per-output factors of a tile, padded with zeros to whole blocks.
struct OutputFactors {
  alignas(64) float scale[kMaxBlocks * kBlockOutputs];  // input_scale * weight_scale[n]
  alignas(64) float bias[kMaxBlocks * kBlockOutputs];
  bool has_bias;

  OutputFactors(const GemmParams& p, int64_t n0, int64_t blocks) : has_bias(p.bias != nullptr) {
    for (int64_t i = 0; i < blocks * kBlockOutputs; ++i) {
      const bool exists = n0 + i < p.n;
      scale[i] = exists ? p.input_scale * p.weight_scale[n0 + i] : 0.0f;
      bias[i] = exists && has_bias ? p.bias[n0 + i] : 0.0f;
    }
  }
};

PQ_INLINE Floats<kLanes> finish_lanes(Words<kLanes> acc, const float* scale, const float* bias) {
  const Floats<kLanes> y =
      __builtin_convertvector((Ints<kLanes>)acc, Floats<kLanes>) * load<Floats<kLanes>>(scale);
  return bias ? y + load<Floats<kLanes>>(bias) : y;
}

// kLanes outputs of one row, of which `count` exist.
template <class Out>
PQ_INLINE void store_outputs(Words<kLanes> acc, const float* scale, const float* bias, Out* y,
                             int64_t count) {
  const Floats<kLanes> value = finish_lanes(acc, scale, bias);
  if (count >= kLanes) {
    store_float(y, value);
  } else if (count > 0) {
    store_float_tail(y, value, count);
  }
}

PQ_INLINE void store_outputs(Words<kLanes> acc, const float*, const float*, int32_t* y,
                             int64_t count) {
  const int64_t exist = count < kLanes ? count : kLanes;
  if (exist > 0) __builtin_memcpy(y, &acc, exist * sizeof(int32_t));
}

// sum [rows, blocks * 16], rows sum_stride apart, of rows m0.. and outputs n0.. of y; `offset` is
// the kOffset of the weights.
template <class Out>
static void finish_tile(const GemmParams& p, const OutputFactors& factors, uint32_t offset,
                        const int32_t* sum, int64_t sum_stride, int64_t rows, int64_t blocks,
                        int64_t m0, int64_t n0) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t correction = static_cast<uint32_t>(p.row_sum[m0 + i]) * offset;
    Out* y = static_cast<Out*>(p.y) + (m0 + i) * p.n + n0;
    for (int64_t c = 0; c < blocks * kBlockOutputs; c += kLanes) {
      const auto acc = load<Words<kLanes>>(sum + i * sum_stride + c) - correction;
      store_outputs(acc, factors.scale + c, factors.has_bias ? factors.bias + c : nullptr, y + c,
                    p.n - n0 - c);
    }
  }
}

using FinishTile = void(const GemmParams&, const OutputFactors&, uint32_t, const int32_t*, int64_t,
                        int64_t, int64_t, int64_t, int64_t);

static inline FinishTile* pick_finish_tile(GemmOutput dtype) {
  switch (dtype) {
    case GemmOutput::kBFloat16:
      return finish_tile<BFloat16>;
    case GemmOutput::kFloat16:
      return finish_tile<Float16>;
    case GemmOutput::kInt32:
      return finish_tile<int32_t>;
    case GemmOutput::kFloat32:
      break;
  }
  return finish_tile<float>;
}

PQ_ISA_NAMESPACE_END
