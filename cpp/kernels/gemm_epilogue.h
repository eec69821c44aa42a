// SPDX-License-Identifier: Apache-2.0
// The end of the low-bit GEMM: raw int32 sums of 16 outputs to one 16-wide piece of a row of y.
//
// Computes acc = sum - correction;  y = float(acc) * scale[n] (+ bias[n]), each operation rounded
// to float32 on its own, then rounded to the output dtype; int32 output is acc itself.
#pragma once

#include "../gemm_params.h"
#include "half.h"
#include "isa_namespace.h"

PQ_ISA_NAMESPACE_BEGIN

// The per-output factors of up to 4 blocks, padded with zeros to whole blocks.
struct OutputFactors {
  alignas(64) float scale[64];  // input_scale * weight_scale[n]
  alignas(64) float bias[64];
  bool has_bias;

  void load(const GemmParams& p, int64_t n0, int64_t count, int64_t padded) {
    has_bias = p.bias != nullptr;
    for (int64_t i = 0; i < padded; ++i) {
      scale[i] = i < count ? p.input_scale * p.weight_scale[n0 + i] : 0.0f;
      bias[i] = i < count && has_bias ? p.bias[n0 + i] : 0.0f;
    }
  }
};

#if defined(__AVX512VNNI__)

static inline void store_16(float* y, __mmask16 mask, __m512 v) {
  _mm512_mask_storeu_ps(y, mask, v);
}

static inline void store_16(Float16* y, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(y, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

static inline void store_16(BFloat16* y, __mmask16 mask, __m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(y, mask, _mm512_cvtepi32_epi16(rounded));
}

template <class Out>
static inline void finish_16(const int32_t* sum, int32_t correction, const float* scale,
                             const float* bias, Out* y, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512i acc = _mm512_sub_epi32(_mm512_loadu_si512(sum), _mm512_set1_epi32(correction));
  __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(scale));
  if (bias) v = _mm512_add_ps(v, _mm512_loadu_ps(bias));
  store_16(y, mask, v);
}

template <>
inline void finish_16<int32_t>(const int32_t* sum, int32_t correction, const float*, const float*,
                               int32_t* y, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  _mm512_mask_storeu_epi32(
      y, mask, _mm512_sub_epi32(_mm512_loadu_si512(sum), _mm512_set1_epi32(correction)));
}

#else

template <class Out>
static inline void finish_16(const int32_t* sum, int32_t correction, const float* scale,
                             const float* bias, Out* y, int64_t count) {
  float v[16];
  for (int r = 0; r < 16; ++r) {
    const uint32_t acc = static_cast<uint32_t>(sum[r]) - static_cast<uint32_t>(correction);
    v[r] = static_cast<float>(static_cast<int32_t>(acc)) * scale[r];
  }
  if (bias) {
    for (int r = 0; r < 16; ++r) v[r] += bias[r];
  }
  for (int64_t r = 0; r < count; ++r) from_float(v[r], y + r);
}

template <>
inline void finish_16<int32_t>(const int32_t* sum, int32_t correction, const float*, const float*,
                               int32_t* y, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    y[r] = static_cast<int32_t>(static_cast<uint32_t>(sum[r]) - static_cast<uint32_t>(correction));
  }
}

#endif

// sum [rows, blocks * 16] of rows m0.. and outputs n0.. of y; `offset` is the weights' kOffset.
template <class Out>
static void finish_tile(const GemmParams& p, const OutputFactors& factors, int32_t offset,
                        const int32_t* sum, int64_t rows, int64_t blocks, int64_t m0, int64_t n0) {
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t correction = static_cast<int32_t>(static_cast<uint32_t>(p.row_sum[m0 + i]) *
                                                    static_cast<uint32_t>(offset));
    Out* y = static_cast<Out*>(p.y) + (m0 + i) * p.n + n0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t left = p.n - n0 - 16 * b;
      finish_16<Out>(sum + (i * blocks + b) * 16, correction, factors.scale + 16 * b,
                     factors.has_bias ? factors.bias + 16 * b : nullptr, y + 16 * b,
                     left < 16 ? left : 16);
    }
  }
}

using FinishTile = void(const GemmParams&, const OutputFactors&, int32_t, const int32_t*, int64_t,
                        int64_t, int64_t, int64_t);

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
