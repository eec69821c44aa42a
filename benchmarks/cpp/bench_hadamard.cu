// SPDX-License-Identifier: Apache-2.0
//
// Hadamard, alone and with SwiGLU and quantization, without Python.
//   bench_hadamard check    small self-checking launches, made for compute-sanitizer
//   bench_hadamard          the same, then microseconds and shares of the copy bandwidth
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "harness.h"
#include "prefixquant/hadamard.h"

namespace prefixquant::bench {
namespace {

std::vector<int8_t> signs_of(int k) {
  std::vector<int8_t> out(k * k, 1);
  compiled_hadamard_signs(k, out.data());
  return out;
}

std::vector<__nv_bfloat16> to_bf16(const std::vector<float>& v) {
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

// The transform by its definition, float32 in the order of the operation.
void transform(std::vector<float>& v, int64_t k, const std::vector<int8_t>& signs) {
  const int64_t pow2 = v.size() / k;
  for (int64_t h = 1; h < pow2; h *= 2) {
    for (size_t i = 0; i < v.size(); ++i) {
      if (i & h) continue;
      const float a = v[i], b = v[i + h];
      v[i] = a + b, v[i + h] = a - b;
    }
  }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(v.size())));
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

int check(const Case& c) {
  const size_t count = c.rows * c.cols;
  const auto x = to_bf16(normal_rows(c.rows, c.cols, true));
  const auto up = to_bf16(normal_rows(c.rows, c.cols, false));
  auto signs = signs_of(c.k);
  if (c.flipped_signs) {
    for (int j = 0; j < c.k; ++j) signs[j] = -signs[j];
  }
  const Buffer<__nv_bfloat16> x_device(x), up_device(up);
  const Buffer<int8_t> signs_device(signs);
  const Buffer<float> scale(std::vector<float>{0.37f}), row_scale(c.rows);
  const Buffer<uint8_t> out(c.scaling == RowScale::kNone ? 2 * count : count);
  RowHadamardParams p;
  p.x = x_device.data(), p.x_stride = c.cols, p.dtype = RowDtype::kBFloat16;
  if (c.swiglu) p.up = up_device.data(), p.up_stride = c.cols;
  p.out = out.data(), p.scaling = c.scaling, p.scale = scale.data(), p.row_scale = row_scale.data();
  p.signs = c.k > 1 ? signs_device.data() : nullptr;
  p.block_size = c.block, p.k = c.k, p.rows = c.rows, p.cols = c.cols;
  launch_hadamard(p, nullptr);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  const auto got = out.host();
  const auto scales = row_scale.host();

  int wrong = 0, ties = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<float> y;
    for (int64_t b = 0; b < c.cols; b += c.block) {
      std::vector<float> v(c.block);
      for (int64_t i = 0; i < c.block; ++i) {
        const float g = __bfloat162float(x[r * c.cols + b + i]);
        const float u = __bfloat162float(up[r * c.cols + b + i]);
        v[i] = c.swiglu ? static_cast<float>(g / (1.0 + std::exp(-static_cast<double>(g)))) * u : g;
      }
      transform(v, c.k, signs);
      y.insert(y.end(), v.begin(), v.end());
    }
    float s = 0.37f;
    if (c.scaling == RowScale::kDynamic) {
      float largest = 0.0f;
      for (const float v : y) largest = std::max(largest, std::fabs(v));
      s = largest / p.qmax;
      wrong += std::fabs(scales[r] - s) > 2e-6f * s;
      s = scales[r];
    }
    for (int64_t i = 0; i < c.cols; ++i) {
      const size_t at = r * c.cols + i;
      if (c.scaling == RowScale::kNone) {
        const __nv_bfloat16 expected = __float2bfloat16_rn(y[i]);
        wrong += std::memcmp(&expected, got.data() + 2 * at, 2) != 0;
        continue;
      }
      const float v = y[i] * (1.0f / s);
      const int q = static_cast<int>(std::min(std::max(std::nearbyintf(v), p.qmin), p.qmax));
      const int step = std::abs(q - static_cast<int8_t>(got[at]));
      if (step == 0) continue;
      // Levels of SwiGLU may differ at a tie; without it, never.
      const bool tie = std::fabs(v - std::floor(v) - 0.5f) <= 1e-5f * std::max(1.0f, std::fabs(v));
      (c.swiglu && step == 1 && tie ? ties : wrong) += 1;
    }
  }
  if (wrong) {
    std::printf("rows %lld cols %lld block %lld k %d swiglu %d scaling %d flipped %d: %d wrong\n",
                static_cast<long long>(c.rows), static_cast<long long>(c.cols),
                static_cast<long long>(c.block), c.k, c.swiglu, static_cast<int>(c.scaling),
                c.flipped_signs, wrong);
  }
  if (ties > 1 + 1e-4 * count) {
    std::printf("%d of %zu levels differ at ties\n", ties, count);
    ++wrong;
  }
  return wrong;
}

constexpr RowScale kNone = RowScale::kNone, kStatic = RowScale::kStatic,
                   kDynamic = RowScale::kDynamic;

int check_all(bool small) {
  int wrong = 0, cases = 0;
  const auto run = [&](const Case& c) {
    for (const int64_t rows : {1, 3, small ? 5 : 300}) {
      Case d = c;
      if (rows == 300 && c.cols > 4096) continue;
      d.rows = rows;
      for (const RowScale scaling : {kNone, kStatic, kDynamic}) {
        d.scaling = scaling;
        for (const bool swiglu : {false, true}) {
          d.swiglu = swiglu;
          if (scaling == kNone && swiglu) continue;
          wrong += check(d), ++cases;
        }
      }
    }
  };
  for (const int64_t block : {1, 2, 4, 8, 64, 256, 512, 1024, 2048, 8192, 16384, 32768}) {
    run({0, block * (block < 64 ? 48 : 1), block, 1, false, kNone});
  }
  run({0, 4096, 256, 1, false, kNone});
  for (const HadamardSums& sums : kHadamardSums) {
    if (sums.k == 1) continue;
    for (const int64_t pow2 : {2, 8, 32, 64, 512}) {
      if (sums.k * pow2 > 56000 || (small && pow2 > 64 && sums.k > 28)) continue;
      run({0, sums.k * pow2 * (pow2 < 64 ? 2 : 1), sums.k * pow2, sums.k, false, kNone});
    }
  }
  run({0, 28672, 28672, 28, false, kNone});
  run({0, 28 * 128, 28 * 64, 28, false, kNone, true});
  run({0, 172 * 64, 172 * 64, 172, false, kNone, true});
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong;
}

void time_case(int64_t rows, int64_t cols, int64_t block, int k, bool swiglu, RowScale scaling,
               double copy) {
  const size_t count = rows * cols;
  const int sources = swiglu ? 2 : 1;
  const double bytes = (2.0 * sources + (scaling == kNone ? 2 : 1)) * count;
  const int copies = std::min(64, copies_out_of_l2(static_cast<size_t>(bytes)));
  std::vector<Buffer<__nv_bfloat16>> x;
  std::vector<Buffer<uint8_t>> out;
  const auto values = to_bf16(normal_rows(std::min<int64_t>(rows, 16), sources * cols, false));
  for (int i = 0; i < copies; ++i) {
    x.emplace_back(sources * count), out.emplace_back(2 * count);
    x[i].repeat(values);
  }
  const Buffer<int8_t> signs(signs_of(k));
  const Buffer<float> scale(std::vector<float>{0.37f}), row_scale(rows);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  const double us = time_us(copies, [&](int i, cudaStream_t stream) {
    RowHadamardParams p;
    p.x = x[i].data(), p.x_stride = sources * cols, p.dtype = RowDtype::kBFloat16;
    if (swiglu) p.up = x[i].data() + cols, p.up_stride = 2 * cols;
    p.out = out[i].data(), p.scaling = scaling, p.scale = scale.data();
    p.row_scale = row_scale.data(), p.signs = k > 1 ? signs.data() : nullptr;
    p.block_size = block, p.k = k, p.rows = rows, p.cols = cols;
    launch_hadamard(p, stream);
  });
  std::printf(
      "%-8s %-8s %6lld x %6lld block %6lld (k %3d)  %8.2f us  %7.1f GB/s  %5.1f %% of copy\n",
      swiglu ? "swiglu" : "plain",
      scaling == kNone     ? "float"
      : scaling == kStatic ? "static"
                           : "dynamic",
      static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(block), k,
      us, bytes / us * 1e-3, 100.0 * bytes / us * 1e6 / copy);
}

struct Size {
  int64_t block;
  int k;
};
constexpr Size kSizes[] = {{1536, 12},  {4864, 76},   {8192, 1},    {8960, 140},
                           {9728, 76},  {11008, 172}, {12288, 12},  {13824, 108},
                           {14336, 28}, {18944, 148}, {27648, 108}, {28672, 28}};

void time_all() {
  const double copy = copy_bandwidth();
  std::printf("device copy: %.3f TB/s\n", copy * 1e-12);
  for (const Size& s : kSizes) {
    for (const int64_t rows : {1, 16, 4096}) {
      time_case(rows, s.block, s.block, s.k, true, kStatic, copy);
      if (rows == 4096 || s.k == 28) time_case(rows, s.block, s.block, s.k, true, kDynamic, copy);
    }
    time_case(4096, s.block, s.block, s.k, false, kNone, copy);
  }
  for (const int64_t block : {1, 128, 256, 512, 1024}) {
    for (const int64_t rows : {1, 4096}) time_case(rows, 14336, block, 1, true, kStatic, copy);
  }
}

}  // namespace
}  // namespace prefixquant::bench

int main(int argc, char** argv) try {
  using namespace prefixquant::bench;
  const std::string mode = argc > 1 ? argv[1] : "";
  const int wrong = mode == "time" ? 0 : check_all(mode == "check");
  if (wrong) return 1;
  if (mode != "check") time_all();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
