// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm + quantize, dynamic quantize and the outlier scan without Python.
//   bench_fused_quant check    small self-checking launches, made for compute-sanitizer
//   bench_fused_quant          the same, then microseconds and shares of the copy bandwidth
// Buffers have exactly the sizes that the interface asks for.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "harness.h"
#include "prefixquant/outlier_scan.h"
#include "prefixquant/rmsnorm_quant.h"

namespace prefixquant::bench {
namespace {

struct Case {
  int64_t rows, cols;
  bool add, normalize, weight;
  RowScale scaling;
  RowResult output;
  bool shift = false;
};

std::vector<__nv_bfloat16> to_bf16(const std::vector<float>& v) {
  std::vector<__nv_bfloat16> out;
  for (const float f : v) out.push_back(__float2bfloat16_rn(f));
  return out;
}

float level(float y, float inv_scale, float qmin, float qmax) {
  const float v = std::min(std::max(std::nearbyintf(y * inv_scale), qmin), qmax);
  return std::isnan(y * inv_scale) ? 0.0f : v;
}

// Wrong levels or values of one launch, by the definition in rmsnorm_quant.h.
int check(const Case& c) {
  const size_t count = c.rows * c.cols;
  const auto x = to_bf16(normal_rows(c.rows, c.cols, true));
  const auto residual = to_bf16(normal_rows(c.rows, c.cols, false));
  const auto weight = to_bf16(normal_rows(1, c.cols, false));
  const auto shift = to_bf16(normal_rows(1, c.cols, false));
  const Buffer<__nv_bfloat16> x_device(x), residual_device(residual), weight_device(weight),
      shift_device(shift);
  const Buffer<float> scale(std::vector<float>{0.37f}), row_scale(c.rows);
  const size_t out_bytes = c.output == RowResult::kFloat    ? 2 * count
                           : c.output == RowResult::kPacked ? count / 2
                                                            : count;
  const Buffer<uint8_t> out(out_bytes);
  RowQuantParams p;
  p.x = x_device.data(), p.dtype = RowDtype::kBFloat16, p.x_stride = c.cols;
  if (c.add) p.residual = residual_device.data(), p.residual_stride = c.cols;
  p.normalize = c.normalize, p.eps = 1e-5;
  if (c.weight) p.weight = weight_device.data(), p.weight_dtype = RowDtype::kBFloat16;
  if (c.shift) p.shift = shift_device.data(), p.shift_dtype = RowDtype::kBFloat16;
  p.out = out.data(), p.output = c.output, p.scaling = c.scaling;
  p.scale = scale.data(), p.row_scale = row_scale.data();
  p.rows = c.rows, p.cols = c.cols;
  launch_row_quant(p, nullptr);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  const auto got = out.host();
  const auto scales = row_scale.host();

  int wrong = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<float> y(c.cols);
    double sum = 0.0;
    for (int64_t i = 0; i < c.cols; ++i) {
      float v = __bfloat162float(x[r * c.cols + i]);
      if (c.add) {
        v += __bfloat162float(residual[r * c.cols + i]);
        v = __bfloat162float(__float2bfloat16_rn(v));
      }
      y[i] = v;
      sum += static_cast<double>(v) * v;
    }
    const float rstd = static_cast<float>(1.0 / std::sqrt(sum / c.cols + 1e-5));
    float largest = 0.0f;
    for (int64_t i = 0; i < c.cols; ++i) {
      if (c.normalize) y[i] = y[i] * rstd;
      if (c.weight) y[i] = y[i] * __bfloat162float(weight[i]);
      if (c.shift) y[i] = y[i] - __bfloat162float(shift[i]);
      largest = std::max(largest, std::fabs(y[i]));
    }
    float s = 0.37f;
    if (c.scaling == RowScale::kDynamic) {
      s = largest == 0.0f ? 1.0f : largest / p.qmax;
      wrong += scales[r] != s;
    }
    for (int64_t i = 0; i < c.cols; ++i) {
      const size_t at = r * c.cols + i;
      const int q = static_cast<int>(level(y[i], 1.0f / s, p.qmin, p.qmax));
      if (c.output == RowResult::kFloat) {
        const __nv_bfloat16 expected = __float2bfloat16_rn(y[i]);
        wrong += std::memcmp(&expected, got.data() + 2 * at, 2) != 0;
      } else if (c.output == RowResult::kInt8) {
        wrong += static_cast<int8_t>(got[at]) != q;
      } else {
        wrong += (got[at / 2] >> (4 * (at % 2)) & 15) != (q & 15);
      }
    }
  }
  std::printf(
      "row_quant %lld x %lld add %d norm %d weight %d shift %d scaling %d output %d: %d wrong\n",
      static_cast<long long>(c.rows), static_cast<long long>(c.cols), c.add, c.normalize, c.weight,
      c.shift, static_cast<int>(c.scaling), static_cast<int>(c.output), wrong);
  return wrong;
}

int check_scan(int64_t rows, int64_t cols) {
  const auto x = to_bf16(normal_rows(rows, cols, true));
  const Buffer<__nv_bfloat16> x_device(x);
  const Buffer<float> row_max(rows), median(1);
  const Buffer<uint8_t> flags(rows);
  const OutlierScanParams p{x_device.data(),
                            RowDtype::kBFloat16,
                            cols,
                            row_max.data(),
                            median.data(),
                            reinterpret_cast<bool*>(flags.data()),
                            64.0f,
                            rows,
                            cols};
  launch_outlier_scan(p, nullptr);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<float> expected(rows, 0.0f);
  for (int64_t i = 0; i < rows * cols; ++i) {
    expected[i / cols] = std::max(expected[i / cols], std::fabs(__bfloat162float(x[i])));
  }
  std::vector<float> sorted = expected;
  std::sort(sorted.begin(), sorted.end());
  const float middle = sorted[(rows - 1) / 2];
  const auto got = row_max.host();
  const auto got_flags = flags.host();
  int wrong = median.host()[0] != middle;
  for (int64_t r = 0; r < rows; ++r) {
    wrong += got[r] != expected[r];
    wrong += (got_flags[r] != 0) != (expected[r] / middle > 64.0f);
  }
  std::printf("outlier_scan %lld x %lld: %d wrong\n", static_cast<long long>(rows),
              static_cast<long long>(cols), wrong);
  return wrong;
}

int check_all() {
  int wrong = 0;
  for (const int64_t cols : {1, 15, 64, 576, 1536, 4096, 8192, 14336, 16384, 20480, 40000, 111}) {
    for (const int64_t rows : {1, 3, 17}) {
      for (const auto scaling : {RowScale::kStatic, RowScale::kDynamic, RowScale::kNone}) {
        const RowResult output = scaling == RowScale::kNone ? RowResult::kFloat : RowResult::kInt8;
        wrong += check({rows, cols, true, true, rows == 3, scaling, output});
        if (output == RowResult::kInt8) {
          wrong += check({rows, cols, false, false, false, scaling, output});
        }
      }
      wrong += check(
          {rows, cols, rows == 17, true, rows == 3, RowScale::kStatic, RowResult::kInt8, true});
      if (cols % 2 == 0) {
        wrong += check({rows, cols, false, true, true, RowScale::kStatic, RowResult::kPacked});
      }
    }
  }
  wrong += check({300, 4096, true, true, true, RowScale::kStatic, RowResult::kInt8});
  wrong += check({300, 14336, false, false, false, RowScale::kDynamic, RowResult::kInt8});
  for (const int64_t rows : {1, 2, 17, 1000, 5000}) {
    for (const int64_t cols : {1, 17, 576, 2048}) wrong += check_scan(rows, cols);
  }
  return wrong;
}

// One launch rotating through copies of x, bytes per element read and written as given.
void time_row_quant(const char* name, int64_t rows, int64_t cols, bool add, bool normalize,
                    RowScale scaling, RowResult output, double bytes_per_element, double copy,
                    bool with_shift = false) {
  const size_t count = rows * cols;
  const int copies = std::min(64, copies_out_of_l2(count * (add ? 5 : 3)));
  std::vector<Buffer<__nv_bfloat16>> x, residual;
  std::vector<Buffer<uint8_t>> out;
  const auto values = to_bf16(normal_rows(std::min<int64_t>(rows, 16), cols, false));
  for (int i = 0; i < copies; ++i) {
    x.emplace_back(count), residual.emplace_back(add ? count : 0), out.emplace_back(2 * count);
    x[i].repeat(values);
    residual[i].repeat(values);
  }
  const Buffer<float> scale(std::vector<float>{0.37f}), row_scale(rows);
  const Buffer<__nv_bfloat16> shift(to_bf16(normal_rows(1, cols, false)));
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  const double us = time_us(copies, [&](int i, cudaStream_t stream) {
    RowQuantParams p;
    p.x = x[i].data(), p.dtype = RowDtype::kBFloat16, p.x_stride = cols;
    if (add) p.residual = residual[i].data(), p.residual_stride = cols;
    p.normalize = normalize, p.eps = 1e-5;
    if (with_shift) p.shift = shift.data(), p.shift_dtype = RowDtype::kBFloat16;
    p.out = out[i].data(), p.output = output, p.scaling = scaling;
    p.scale = scale.data(), p.row_scale = row_scale.data();
    p.rows = rows, p.cols = cols;
    launch_row_quant(p, stream);
  });
  const double rate = bytes_per_element * count / us * 1e6;
  std::printf("%-28s %6lld x %6lld  %9.2f us  %7.1f GB/s  %5.1f %% of copy\n", name,
              static_cast<long long>(rows), static_cast<long long>(cols), us, rate * 1e-9,
              100.0 * rate / copy);
}

void time_scan(int64_t rows, int64_t cols, double copy) {
  const size_t count = rows * cols;
  const int copies = std::min(8, copies_out_of_l2(count * 2));
  std::vector<Buffer<__nv_bfloat16>> x;
  const auto values = to_bf16(normal_rows(64, cols, false));
  for (int i = 0; i < copies; ++i) {
    x.emplace_back(count);
    x[i].repeat(values);
  }
  const Buffer<float> row_max(rows), median(1);
  const Buffer<uint8_t> flags(rows);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  const double us = time_us(copies, [&](int i, cudaStream_t stream) {
    launch_outlier_scan({x[i].data(), RowDtype::kBFloat16, cols, row_max.data(), median.data(),
                         reinterpret_cast<bool*>(flags.data()), 64.0f, rows, cols},
                        stream);
  });
  const double rate = 2.0 * count / us * 1e6;
  std::printf("%-28s %6lld x %6lld  %9.2f us  %7.1f GB/s  %5.1f %% of copy\n", "outlier_scan",
              static_cast<long long>(rows), static_cast<long long>(cols), us, rate * 1e-9,
              100.0 * rate / copy);
}

void time_all() {
  const double copy = copy_bandwidth();
  std::printf("device copy: %.3f TB/s\n", copy * 1e-12);
  constexpr RowScale kStatic = RowScale::kStatic, kDynamic = RowScale::kDynamic;
  constexpr RowResult kInt8 = RowResult::kInt8, kPacked = RowResult::kPacked;
  for (const int64_t cols : {576, 2048, 4096, 5120, 8192, 14336}) {
    for (const int64_t rows : {1, 16, 4096, 16384}) {
      time_row_quant("rmsnorm_quantize", rows, cols, false, true, kStatic, kInt8, 3, copy);
      time_row_quant("rmsnorm_quantize packed", rows, cols, false, true, kStatic, kPacked, 2.5,
                     copy);
      time_row_quant("rmsnorm_quantize shift", rows, cols, false, true, kStatic, kInt8, 3, copy,
                     true);
      time_row_quant("add_rmsnorm_quantize", rows, cols, true, true, kStatic, kInt8, 7, copy);
      time_row_quant("rmsnorm_quantize_dynamic", rows, cols, false, true, kDynamic, kInt8, 3, copy);
      time_row_quant("quantize_static", rows, cols, false, false, kStatic, kInt8, 3, copy);
      time_row_quant("quantize_dynamic", rows, cols, false, false, kDynamic, kInt8, 3, copy);
    }
  }
  for (const int64_t cols : {576, 1536, 14336}) {
    for (const int64_t rows : {512, 65536}) time_scan(rows, cols, copy);
  }
}

}  // namespace
}  // namespace prefixquant::bench

int main(int argc, char** argv) try {
  using namespace prefixquant::bench;
  const int wrong = check_all();
  std::printf(wrong ? "WRONG\n" : "all exact\n");
  if (wrong) return 1;
  if (argc == 1 || std::string(argv[1]) != "check") time_all();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
