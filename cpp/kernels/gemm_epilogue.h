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

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

// The per-output factors of some blocks, padded with zeros to whole blocks.
struct OutputFactors {
  const float* scale;  // input_scale * weight_scale[n]
  const float* bias;   // nullptr: none

  OutputFactors after(int64_t outputs) const {
    return {scale + outputs, bias ? bias + outputs : bias};
  }
};

// `storage`: 2 floats for each of the `outputs` (a multiple of 16) from n0 on.
static inline OutputFactors load_factors(const GemmParams& p, int64_t n0, int64_t outputs,
                                         float* storage) {
  for (int64_t i = 0; i < outputs; ++i) {
    const bool exists = n0 + i < p.n;
    storage[i] = exists ? p.input_scale * p.weight_scale[n0 + i] : 0.0f;
    if (p.bias) storage[outputs + i] = exists ? p.bias[n0 + i] : 0.0f;
  }
  return {storage, p.bias ? storage + outputs : nullptr};
}

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
  if (count >= kLanes) {
    store(y, acc);
  } else if (count > 0) {
    __builtin_memcpy(y, &acc, count * sizeof(int32_t));
  }
}

#if defined(__AVX512VNNI__)
// Whole tiles of 32 outputs, the bulk of a large product: factors in registers, no per-vector
// branches, and bfloat16 rounded in 32-bit lanes whose upper halves one permutation gathers. At
// K = 576 the general loop below takes as long as the AMX products themselves.
PQ_INLINE void store_32(float* y, Floats<16> v0, Floats<16> v1) {
  store(y, v0);
  store(y + 16, v1);
}

PQ_INLINE void store_32(Float16* y, Floats<16> v0, Floats<16> v1) {
  store_float(y, v0);
  store_float(y + 16, v1);
}

PQ_INLINE __m512i round_to_upper_half(Floats<16> v) {
  const Words<16> bits = (Words<16>)v;
  const Words<16> rounded = bits + (((bits >> 16) & 1u) + 0x7FFFu);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7FC00000));
}

PQ_INLINE void store_32(BFloat16* y, Floats<16> v0, Floats<16> v1) {
  alignas(64) static const uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                        23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                        45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(
      y, _mm512_permutex2var_epi16(round_to_upper_half(v0), _mm512_load_si512(kUpperHalves),
                                   round_to_upper_half(v1)));
}

template <class Out, bool BIAS>
static void finish_whole_tile(const GemmParams& p, const OutputFactors& factors, uint32_t offset,
                              const int32_t* sum, int64_t sum_stride, int64_t rows, int64_t m0,
                              int64_t n0) {
  const auto scale0 = load<Floats<16>>(factors.scale),
             scale1 = load<Floats<16>>(factors.scale + 16);
  Floats<16> bias0 = {}, bias1 = {};
  if constexpr (BIAS) {
    bias0 = load<Floats<16>>(factors.bias);
    bias1 = load<Floats<16>>(factors.bias + 16);
  }
  Out* y = static_cast<Out*>(p.y) + m0 * p.n + n0;
  for (int64_t i = 0; i < rows; ++i, sum += sum_stride, y += p.n) {
    const uint32_t correction = static_cast<uint32_t>(p.row_sum[m0 + i]) * offset;
    const auto acc0 = (Ints<16>)(load<Words<16>>(sum) - correction);
    const auto acc1 = (Ints<16>)(load<Words<16>>(sum + 16) - correction);
    Floats<16> v0 = __builtin_convertvector(acc0, Floats<16>) * scale0;
    Floats<16> v1 = __builtin_convertvector(acc1, Floats<16>) * scale1;
    if constexpr (BIAS) {
      v0 += bias0;
      v1 += bias1;
    }
    store_32(y, v0, v1);
  }
}
#endif

// sum [rows, blocks * 16], rows sum_stride apart, of rows m0.. and outputs n0.. of y; `offset` is
// the kOffset of the weights.
template <class Out>
static void finish_tile(const GemmParams& p, const OutputFactors& factors, uint32_t offset,
                        const int32_t* sum, int64_t sum_stride, int64_t rows, int64_t blocks,
                        int64_t m0, int64_t n0) {
#if defined(__AVX512VNNI__)
  if constexpr (!SameType<Out, int32_t>::value) {
    if (blocks == 2 && n0 + 32 <= p.n) {
      const auto finish =
          factors.bias ? finish_whole_tile<Out, true> : finish_whole_tile<Out, false>;
      return finish(p, factors, offset, sum, sum_stride, rows, m0, n0);
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t correction = static_cast<uint32_t>(p.row_sum[m0 + i]) * offset;
    Out* y = static_cast<Out*>(p.y) + (m0 + i) * p.n + n0;
    for (int64_t c = 0; c < blocks * kBlockOutputs; c += kLanes) {
      const auto acc = load<Words<kLanes>>(sum + i * sum_stride + c) - correction;
      store_outputs(acc, factors.scale + c, factors.bias ? factors.bias + c : nullptr, y + c,
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
