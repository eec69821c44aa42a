// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm + quantize, dynamic quantize and the outlier scan without Python.
//   bench_fused_quant check    small self-checking launches, made for compute-sanitizer
//   bench_fused_quant          the same, then microseconds and shares of the copy bandwidth
//   bench_fused_quant time 576    the latter alone, of the row-wise kernels on rows of 576
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
  RowDtype dtype = RowDtype::kBFloat16;     // of x and the residual
  RowDtype channels = RowDtype::kBFloat16;  // of weight and shift
  bool poisoned = false;                    // numbers that are none, infinite, subnormal, huge
  float scale = 0.37f, qmin = -8.0f, qmax = 7.0f;
  double eps = 1e-5;
};

std::vector<__nv_bfloat16> to_bf16(const std::vector<float>& v) {
  std::vector<__nv_bfloat16> out;
  for (const float f : v) out.push_back(__float2bfloat16_rn(f));
  return out;
}

// One value as memory of `dtype` has it.
void store(float v, RowDtype dtype, uint8_t* to) {
  const __nv_bfloat16 b = __float2bfloat16_rn(v);
  const __half h = __float2half_rn(v);
  if (dtype == RowDtype::kFloat32) std::memcpy(to, &v, 4);
  if (dtype == RowDtype::kBFloat16) std::memcpy(to, &b, 2);
  if (dtype == RowDtype::kFloat16) std::memcpy(to, &h, 2);
}

float load(RowDtype dtype, const uint8_t* from) {
  float v;
  __nv_bfloat16 b;
  __half h;
  std::memcpy(&v, from, dtype == RowDtype::kFloat32 ? 4 : 2);
  std::memcpy(&b, &v, 2);
  std::memcpy(&h, &v, 2);
  return dtype == RowDtype::kFloat32    ? v
         : dtype == RowDtype::kBFloat16 ? __bfloat162float(b)
                                        : __half2float(h);
}

float rounded(float v, RowDtype dtype) {
  uint8_t bytes[4];
  store(v, dtype, bytes);
  return load(dtype, bytes);
}

int64_t bytes_of(RowDtype dtype) { return dtype == RowDtype::kFloat32 ? 4 : 2; }

// The values in memory; `values` becomes what memory has.
std::vector<uint8_t> to_memory(std::vector<float>& values, RowDtype dtype) {
  std::vector<uint8_t> out(values.size() * bytes_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    store(values[i], dtype, out.data() + i * bytes_of(dtype));
    values[i] = rounded(values[i], dtype);
  }
  return out;
}

// What a row may have beside numbers of ordinary size: alone, and several of them in row 7. Row 8
// is zero.
void poison(std::vector<float>& values, int64_t rows, int64_t cols) {
  const float special[] = {NAN, INFINITY, -INFINITY, 1e-39f, -3e38f, -0.0f, -NAN};
  for (int64_t r = 0; r < std::min<int64_t>(rows, 8); ++r) {
    for (int64_t i = 0; i < 7; ++i) {
      if (r == i || r == 7) values[r * cols + (37 * i + 5) % cols] = special[i];
    }
  }
  if (rows > 8) std::fill(&values[8 * cols], &values[9 * cols], 0.0f);
}

float level(float y, float inv_scale, float qmin, float qmax) {
  const float v = std::min(std::max(std::nearbyintf(y * inv_scale), qmin), qmax);
  return std::isnan(y * inv_scale) ? 0.0f : v;
}

// Wrong levels or values of one launch, by the definition in rmsnorm_quant.h. brief: says only what
// is wrong.
int check(const Case& c, bool brief = false) {
  const size_t count = c.rows * c.cols;
  auto x = normal_rows(c.rows, c.cols, true), residual = normal_rows(c.rows, c.cols, false);
  auto weight = normal_rows(1, c.cols, false), shift = normal_rows(1, c.cols, false);
  if (c.poisoned) {
    poison(x, c.rows, c.cols);
    if (c.weight) weight[c.cols / 2] = NAN, weight[c.cols - 1] = INFINITY;
    shift[0] = -INFINITY, shift[c.cols / 3] = NAN;
  }
  const Buffer<uint8_t> x_device(to_memory(x, c.dtype)),
      residual_device(to_memory(residual, c.dtype)), weight_device(to_memory(weight, c.channels)),
      shift_device(to_memory(shift, c.channels));
  const Buffer<float> scale(std::vector<float>{c.scale}), row_scale(c.rows);
  const size_t out_bytes = c.output == RowResult::kFloat    ? bytes_of(c.dtype) * count
                           : c.output == RowResult::kPacked ? count / 2
                                                            : count;
  const Buffer<uint8_t> out(out_bytes);
  RowQuantParams p;
  p.x = x_device.data(), p.dtype = c.dtype, p.x_stride = c.cols;
  if (c.add) p.residual = residual_device.data(), p.residual_stride = c.cols;
  p.normalize = c.normalize, p.eps = c.eps;
  if (c.weight) p.weight = weight_device.data(), p.weight_dtype = c.channels;
  if (c.shift) p.shift = shift_device.data(), p.shift_dtype = c.channels;
  p.out = out.data(), p.output = c.output, p.scaling = c.scaling;
  p.scale = scale.data(), p.row_scale = row_scale.data();
  p.qmin = c.qmin, p.qmax = c.qmax;
  p.rows = c.rows, p.cols = c.cols;
  launch_row_quant(p, nullptr);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  const auto got = out.host(), sums = residual_device.host();
  const auto scales = row_scale.host();
  const auto differ = [](float a, float b) {
    return std::memcmp(&a, &b, 4) != 0 && !(std::isnan(a) && std::isnan(b));
  };

  int wrong = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<float> y(c.cols);
    double sum = 0.0;
    for (int64_t i = 0; i < c.cols; ++i) {
      const size_t at = r * c.cols + i;
      float v = x[at];
      if (c.add) {
        v = rounded(residual[at] + v, c.dtype);
        wrong += differ(load(c.dtype, sums.data() + at * bytes_of(c.dtype)), v);
      }
      y[i] = v;
      sum += static_cast<double>(v) * v;
    }
    const float rstd = static_cast<float>(1.0 / std::sqrt(sum / c.cols + c.eps));
    float largest = 0.0f;
    for (int64_t i = 0; i < c.cols; ++i) {
      if (c.normalize) y[i] = y[i] * rstd;
      if (c.weight) y[i] = y[i] * weight[i];
      if (c.shift) y[i] = y[i] - shift[i];
      largest = std::isnan(y[i]) || std::isnan(largest) ? NAN : std::max(largest, std::fabs(y[i]));
    }
    float s = c.scale;
    if (c.scaling == RowScale::kDynamic) {
      s = largest / p.qmax;
      if (s == 0.0f) s = 1.0f;
      wrong += differ(scales[r], s);
    }
    for (int64_t i = 0; i < c.cols; ++i) {
      const size_t at = r * c.cols + i;
      const int q = static_cast<int>(level(y[i], 1.0f / s, p.qmin, p.qmax));
      if (c.output == RowResult::kFloat) {
        wrong += differ(load(c.dtype, got.data() + at * bytes_of(c.dtype)), rounded(y[i], c.dtype));
      } else if (c.output == RowResult::kInt8) {
        wrong += static_cast<int8_t>(got[at]) != q;
      } else {
        wrong += (got[at / 2] >> (4 * (at % 2)) & 15) != (q & 15);
      }
    }
  }
  if (brief && wrong == 0) return 0;
  std::printf(
      "row_quant %lld x %lld dtype %d channels %d add %d norm %d weight %d shift %d scaling %d "
      "output %d scale %g levels %g..%g%s: %d wrong\n",
      static_cast<long long>(c.rows), static_cast<long long>(c.cols), static_cast<int>(c.dtype),
      static_cast<int>(c.channels), c.add, c.normalize, c.weight, c.shift,
      static_cast<int>(c.scaling), static_cast<int>(c.output), c.scale, c.qmin, c.qmax,
      c.poisoned ? " poisoned" : "", wrong);
  return wrong;
}

// Every way through the kernels of rows that a warp holds.
int check_warp_rows(int64_t cols) {
  constexpr RowDtype kDtypes[] = {RowDtype::kFloat32, RowDtype::kBFloat16, RowDtype::kFloat16};
  int wrong = 0;
  for (const RowDtype dtype : kDtypes) {
    for (int bits = 0; bits < 8; ++bits) {
      const bool add = bits & 1, weight = bits & 2, shift = bits & 4;
      for (const RowDtype channels : kDtypes) {
        Case c{9,     cols,  add,     true, weight, RowScale::kStatic, RowResult::kInt8,
               shift, dtype, channels};
        c.poisoned = channels == dtype;
        for (const RowResult output : {RowResult::kInt8, RowResult::kPacked}) {
          c.output = output;
          wrong += check(c, true);
        }
        if (shift) continue;
        c.scaling = RowScale::kNone, c.output = RowResult::kFloat;
        wrong += check(c, true);
        c.scaling = RowScale::kDynamic, c.output = RowResult::kInt8;
        for (const float qmax : {7.0f, 127.0f, 100.0f}) {
          c.qmax = qmax, c.qmin = -qmax - (qmax != 100.0f);
          wrong += check(c, true);
        }
      }
      // Scales and bounds of every kind, with rows of ordinary numbers and with poisoned ones.
      for (const float scale : {0.01f, -0.01f, 1e-30f, 1e-44f, 0.0f, 1e25f, 3e38f, INFINITY, NAN}) {
        for (const float qmax : {127.0f, 7.0f, 1.0f, 100.0f}) {
          Case c{9,     cols,  add,   true,        weight, RowScale::kStatic, RowResult::kInt8,
                 shift, dtype, dtype, qmax == 7.0f};
          c.scale = scale, c.qmax = qmax, c.qmin = -qmax - (qmax != 100.0f);
          wrong += check(c, true);
          c.normalize = false, c.weight = c.shift = false;
          if (!weight && !shift) wrong += check(c, true);
        }
      }
    }
    for (const RowScale scaling : {RowScale::kNone, RowScale::kStatic}) {
      Case c{9,
             cols,
             false,
             true,
             false,
             scaling,
             scaling == RowScale::kNone ? RowResult::kFloat : RowResult::kInt8};
      c.dtype = dtype, c.poisoned = true, c.eps = 0.0;
      wrong += check(c, true);
    }
    wrong += check({4097, cols, false, true, false, RowScale::kStatic, RowResult::kInt8, true,
                    dtype, dtype, false, 0.02f, -128.0f, 127.0f});
  }
  std::printf("rows of %lld of every kind: %d wrong\n", static_cast<long long>(cols), wrong);
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
  for (const int64_t cols : {576, 512}) wrong += check_warp_rows(cols);
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

void time_rows(const std::vector<int64_t>& widths, double copy) {
  constexpr RowScale kStatic = RowScale::kStatic, kDynamic = RowScale::kDynamic;
  constexpr RowResult kInt8 = RowResult::kInt8, kPacked = RowResult::kPacked;
  for (const int64_t cols : widths) {
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
}

double copy_rate() {
  const double copy = copy_bandwidth();
  std::printf("device copy: %.3f TB/s\n", copy * 1e-12);
  return copy;
}

void time_all() {
  const double copy = copy_rate();
  time_rows({576, 2048, 4096, 5120, 8192, 14336}, copy);
  for (const int64_t cols : {576, 1536, 14336}) {
    for (const int64_t rows : {512, 65536}) time_scan(rows, cols, copy);
  }
}

}  // namespace
}  // namespace prefixquant::bench

int main(int argc, char** argv) try {
  using namespace prefixquant::bench;
  if (argc == 3 && std::string(argv[1]) == "time") {
    time_rows({std::stoll(argv[2])}, copy_rate());
    return 0;
  }
  const int wrong = check_all();
  std::printf(wrong ? "WRONG\n" : "all exact\n");
  if (wrong) return 1;
  if (argc == 1 || std::string(argv[1]) != "check") time_all();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
