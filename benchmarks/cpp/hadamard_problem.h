// SPDX-License-Identifier: Apache-2.0
//
// What bench_hadamard launches: cases, the configurations that can do them, and their results by
// the definition of the operation.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "harness.h"
#include "prefixquant/hadamard.h"
#include "prefixquant/launch.h"

namespace prefixquant::bench {

// The compiled matrix; where there is none, any signs.
inline std::vector<int8_t> signs_of(int k) {
  std::vector<int8_t> out(k * k, 1);
  if (k == 1 || compiled_hadamard_signs(k, out.data())) return out;
  for (int8_t& sign : out) sign = generator()() & 1 ? 1 : -1;
  return out;
}

inline std::vector<__nv_bfloat16> to_bf16(const std::vector<float>& v) {
  std::vector<__nv_bfloat16> out;
  for (const float f : v) out.push_back(__float2bfloat16_rn(f));
  return out;
}

struct Case {
  int64_t rows, cols, block;
  int k;
  bool swiglu;
  RowScale scaling;
  bool flipped_signs = false;  // another Hadamard matrix than the compiled one
};

// The k part on integers (60 < k < 512), float64 where it is exact.
inline std::vector<float> integer_sums(const std::vector<float>& v, int64_t k,
                                       const std::vector<int8_t>& signs, float norm) {
  float largest = 0.0f;
  for (const float x : v) largest = std::max(largest, std::fabs(x));
  int exponent = 0;
  std::frexp(largest, &exponent);
  exponent = std::max(exponent, -90);
  const int64_t pow2 = v.size() / k;
  std::vector<int32_t> integers(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    integers[i] = static_cast<int32_t>(std::nearbyint(std::ldexp(1.0 * v[i], 22 - exponent)));
  }
  const float factor = std::ldexp(norm, exponent - 22);
  std::vector<float> y(v.size());
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t r = 0; r < pow2; ++r) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += signs[i * k + j] * integers[j * pow2 + r];
      y[i * pow2 + r] = static_cast<float>(sum) * factor;
    }
  }
  return y;
}

// The transform by its definition, float32 in the order of the operation.
inline void transform(std::vector<float>& v, int64_t k, const std::vector<int8_t>& signs) {
  const int64_t pow2 = v.size() / k;
  for (int64_t h = 1; h < pow2; h *= 2) {
    for (size_t i = 0; i < v.size(); ++i) {
      if (i & h) continue;
      const float a = v[i], b = v[i + h];
      v[i] = a + b, v[i + h] = a - b;
    }
  }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(v.size())));
  if (hadamard_sums_are_integers(k)) {
    v = integer_sums(v, k, signs, norm);
    return;
  }
  std::vector<float> y(v.size());
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t r = 0; r < pow2; ++r) {
      float total = k > 1 ? 0.0f : v[r];
      for (int64_t j = 0; k > 1 && j < k; j += 4) {
        float x[4];
        for (int b = 0; b < 4; ++b) x[b] = signs[i * k + j + b] * v[(j + b) * pow2 + r];
        total += (x[0] + x[1]) + (x[2] + x[3]);
      }
      y[i * pow2 + r] = total * norm;
    }
  }
  v = y;
}

// Every configuration that can do it, the chosen one first.
inline std::vector<HadamardConfig> configs_of(const RowHadamardParams& p) {
  const HadamardDevice device = current_hadamard_device();
  const bool vectors = hadamard_vectors(p);
  std::vector<HadamardConfig> configs = {
      choose_hadamard_config(p, vectors, device), hadamard_sums_config(p, vectors, device),
      hadamard_pair_config(p, vectors, device),   hadamard_mma_config(p, vectors, device),
      hadamard_wgmma_config(p, vectors, device),  hadamard_pair_wgmma_config(p, vectors, device)};
  for (const auto& pair_config : {hadamard_pair_config, hadamard_pair_wgmma_config}) {
    configs.push_back(pair_config(p, vectors, device));
    // One cluster takes all blocks.
    configs.back().grid = std::min<int64_t>(configs.back().cluster, configs.back().grid);
  }
  for (const int cluster : {1, 2, 4, 8, 16}) {
    configs.push_back(hadamard_cluster_config(p, vectors, device, cluster));
    if (hadamard_sums_are_integers(p.k)) continue;
    configs.push_back(configs.back());
    configs.back().threads = 1536 - configs.back().threads;  // 1024 for 512
  }
  std::vector<HadamardConfig> possible;
  for (const HadamardConfig& config : configs) {
    if (config.grid > 0) possible.push_back(config);
  }
  return possible;
}

inline std::string text_of(const HadamardConfig& config) {
  static const char* const kNames[] = {"registers", "sums",       "pair",    "mma",
                                       "wgmma",     "pair/wgmma", "cluster", "generic"};
  const bool shared = config.kernel == HadamardKernel::kCluster;
  if (config.kernel == HadamardKernel::kPair || config.kernel == HadamardKernel::kPairWgmma) {
    return std::string(kNames[static_cast<int>(config.kernel)]) + " of " +
           std::to_string(config.grid);
  }
  return kNames[static_cast<int>(config.kernel)] +
         (shared ? "/" + std::to_string(config.cluster) + " x " + std::to_string(config.threads)
                 : "");
}

struct Expected {
  std::vector<float> y;       // [rows, cols]
  std::vector<float> scales;  // [rows], for kDynamic
};

inline Expected expected_of(const Case& c, const std::vector<__nv_bfloat16>& x,
                            const std::vector<__nv_bfloat16>& up, const std::vector<int8_t>& signs,
                            float qmax) {
  Expected out;
  for (int64_t r = 0; r < c.rows; ++r) {
    float largest = 0.0f;
    for (int64_t b = r * c.cols; b < (r + 1) * c.cols; b += c.block) {
      std::vector<float> v(c.block);
      for (int64_t i = 0; i < c.block; ++i) {
        const float g = __bfloat162float(x[b + i]), u = __bfloat162float(up[b + i]);
        v[i] = c.swiglu ? static_cast<float>(g / (1.0 + std::exp(-static_cast<double>(g)))) * u : g;
      }
      transform(v, c.k, signs);
      for (const float f : v) largest = std::max(largest, std::fabs(f));
      out.y.insert(out.y.end(), v.begin(), v.end());
    }
    out.scales.push_back(largest / qmax);
  }
  return out;
}

// Wrong elements of a result; `ties` counts levels that SwiGLU moved across a tie.
inline int wrong_of(const Case& c, const RowHadamardParams& p, const Expected& expected,
                    const std::vector<uint8_t>& got, const std::vector<float>& scales, int& ties) {
  int wrong = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    float s = 0.37f;
    if (c.scaling == RowScale::kDynamic) {
      s = scales[r];
      wrong += !(std::fabs(s - expected.scales[r]) <= 2e-6f * expected.scales[r]);
    }
    for (int64_t at = r * c.cols; at < (r + 1) * c.cols; ++at) {
      if (c.scaling == RowScale::kNone) {
        const __nv_bfloat16 rounded = __float2bfloat16_rn(expected.y[at]);
        wrong += std::memcmp(&rounded, got.data() + 2 * at, 2) != 0;
        continue;
      }
      const float v = expected.y[at] * (1.0f / s);
      const int q = static_cast<int>(std::min(std::max(std::nearbyintf(v), p.qmin), p.qmax));
      const int step = std::abs(q - static_cast<int8_t>(got[at]));
      if (step == 0) continue;
      // Levels of SwiGLU may differ at a tie; without it, never.
      const bool tie = std::fabs(v - std::floor(v) - 0.5f) <= 1e-5f * std::max(1.0f, std::fabs(v));
      (c.swiglu && step == 1 && tie ? ties : wrong) += 1;
    }
  }
  return wrong;
}

}  // namespace prefixquant::bench
