// SPDX-License-Identifier: Apache-2.0
//
// Microbenchmark and checker of the low-bit GEMM family; needs no Python.
//   bench_gemm_w4 check                  every Hopper tile and epilogue against a plain reference
//   bench_gemm_w4 check-few              the same on two small shapes, for compute-sanitizer
//   bench_gemm_w4 sweep [bits] [M,M,..] [window]  every tile and split on every shape: what the
//                                        table in gemm_w4_sm90_config.cpp is fitted to
//   bench_gemm_w4 epilogues [bits] [M,M,..] [window]  the fused epilogues against the plain one
//   bench_gemm_w4 bench [bits] [M,M,..] [window]  the chosen config against cuBLASLt FP16 and
//                                        CUTLASS int8, with ratios and geometric means
// Window: milliseconds of measurement a cell. An H100 at full int8 rate throttles within tens of
// milliseconds, by up to 10 %: compare cells of one window only.
// Weights rotate so that they come from memory, not from L2; launches are replayed from a CUDA
// graph; FP16 gets Gaussian data, integer weights are Gaussian rounded to their grid.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "peers.h"
#include "prefixquant/check.h"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant::bench {
namespace {

// ---------------------------------------------------------------- data

__device__ inline uint32_t hash(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull, x ^= x >> 33;
  return static_cast<uint32_t>(x);
}

__device__ inline float gaussian(uint64_t seed, int64_t i) {
  const float u = (hash(seed * 0x9E3779B97F4A7C15ull + 2 * i) + 1.0f) * 2.3283064e-10f;
  const float v = hash(seed * 0x9E3779B97F4A7C15ull + 2 * i + 1) * 2.3283064e-10f;
  return sqrtf(-2.0f * __logf(u)) * __cosf(6.2831853f * v);
}

enum class Fill { kHalf, kInt8, kInt4Pairs, kFloatPositive };

// Gaussian times `sigma`; integers are clamped to [low, high].
__global__ void fill_kernel(void* data, int64_t count, Fill kind, float sigma, int low, int high,
                            uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float g = gaussian(seed, 2 * i) * sigma;
    const auto level = [&](float v) { return min(max(__float2int_rn(v), low), high); };
    switch (kind) {
      case Fill::kHalf:
        static_cast<__half*>(data)[i] = __float2half(g);
        break;
      case Fill::kInt8:
        static_cast<int8_t*>(data)[i] = static_cast<int8_t>(level(g));
        break;
      case Fill::kInt4Pairs: {
        const float other = gaussian(seed, 2 * i + 1) * sigma;
        static_cast<uint8_t*>(data)[i] = (level(g) & 0xF) | (level(other) & 0xF) << 4;
        break;
      }
      case Fill::kFloatPositive:
        static_cast<float*>(data)[i] = fabsf(g) + 0.25f * sigma;
        break;
    }
  }
}

template <typename T>
struct DeviceArray {
  T* data = nullptr;
  int64_t size = 0;
  explicit DeviceArray(int64_t n) : size(n) {
    PQ_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data), std::max<int64_t>(n, 1) * sizeof(T)));
  }
  ~DeviceArray() { cudaFree(data); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  void fill(Fill kind, float sigma, int low, int high, uint64_t seed, int64_t count = -1) {
    fill_kernel<<<1024, 256>>>(data, count < 0 ? size : count, kind, sigma, low, high, seed);
    PQ_CUDA_CHECK(cudaGetLastError());
  }
};

// ---------------------------------------------------------------- reference

// One thread an output: canonical weights, int64 would give the same sums.
__global__ void reference_kernel(const int8_t* x, const uint8_t* w, int bits, int32_t* acc, int m,
                                 int n, int k) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= int64_t{m} * n) return;
  const int row = static_cast<int>(i / n), channel = static_cast<int>(i % n);
  int32_t sum = 0;
  for (int j = 0; j < k; ++j) {
    int weight;
    if (bits == 4) {
      const int nibble = w[int64_t{channel} * (k / 2) + j / 2] >> (j % 2 * 4) & 0xF;
      weight = (nibble ^ 8) - 8;
    } else {
      weight = static_cast<int8_t>(w[int64_t{channel} * k + j]);
    }
    sum += weight * x[int64_t{row} * k + j];
  }
  acc[i] = sum;
}

float round16(float y, GemmDtype dtype) {
  return dtype == GemmDtype::kBFloat16 ? __bfloat162float(__float2bfloat16(y))
                                       : __half2float(__float2half(y));
}

// ---------------------------------------------------------------- candidates

struct TileChoice {
  int rows, tokens, cluster, split;
};
const std::vector<TileChoice>& tiles(int bits) {
  static const std::vector<TileChoice> w4 = {
      {128, 256, 2, 1}, {128, 192, 2, 1}, {128, 128, 1, 1}, {128, 128, 2, 1}, {128, 128, 1, 2},
      {128, 96, 1, 1},  {128, 96, 1, 2},  {256, 64, 1, 1},  {128, 64, 1, 1},  {128, 64, 2, 1},
      {128, 64, 1, 2},  {256, 32, 1, 1},  {128, 32, 1, 1},  {128, 32, 1, 2},  {128, 16, 1, 1}};
  static const std::vector<TileChoice> w8 = {
      {128, 256, 2, 1}, {128, 192, 2, 1}, {128, 128, 1, 1}, {128, 128, 2, 1}, {128, 128, 1, 2},
      {128, 64, 1, 1},  {128, 64, 1, 2},  {128, 32, 1, 1},  {128, 32, 1, 2},  {128, 16, 1, 1}};
  return bits == 4 ? w4 : w8;
}

int div_up(int a, int b) { return (a + b - 1) / b; }

// The ways to spread one tile shape over the SMs: whole tiles, fixed splits, stream-K.
std::vector<GemmW4Config> spreads(const GemmW4Shape& shape, const TileChoice& t, int sm_count) {
  GemmW4Config base;
  base.kernel = GemmW4Kernel::kWgmmaSm90;
  base.block_rows = t.rows, base.block_tokens = t.tokens, base.cluster = t.cluster;
  const int tile_count = div_up(shape.n, t.rows * t.cluster) * div_up(shape.m, t.tokens);
  const int clusters = sm_count / t.cluster;
  const int k_iterations = padded_k(shape.k) / 128;
  std::vector<GemmW4Config> result;
  base.split_k = t.split;
  if (t.split > 1) {
    base.grid = tile_count * t.split;
    if (base.grid <= sm_count && t.split <= k_iterations) result.push_back(base);
    return result;
  }
  const auto add = [&](int used, int stream_k) {
    GemmW4Config c = base;
    c.grid = used * t.cluster, c.stream_k_tiles = stream_k;
    result.push_back(c);
  };
  add(std::min(tile_count, clusters), 0);
  if (tile_count < clusters) {
    for (int split = 2; split * tile_count <= clusters && split * 2 <= k_iterations; ++split)
      if (split <= 4 || (split + 1) * tile_count > clusters) add(split * tile_count, tile_count);
    if (clusters % tile_count != 0) add(clusters, tile_count);
  } else if (tile_count % clusters != 0) {
    const int rest = tile_count % clusters;
    add(clusters, rest);
    if (tile_count >= clusters + rest) add(clusters, clusters + rest);
  }
  return result;
}

// ---------------------------------------------------------------- check

struct Failure {
  int64_t count = 0;
  int64_t first = -1;
};

class Checker {
 public:
  explicit Checker(int sm_count) : sm_count_(sm_count) {}
  // `few`: two small shapes, for runs under compute-sanitizer.
  bool run(bool few) {
    few_ = few;
    const int shapes[][3] = {{17, 576, 1536},    {300, 333, 592},  {1, 64, 64},
                             {3, 192, 576},      {137, 1000, 576}, {64, 4096, 4096},
                             {513, 2050, 11008}, {256, 640, 18944}};
    for (int bits : {4, 8})
      for (int i = 0; i < (few ? 2 : 8); ++i)
        check_shape(shapes[i][0], shapes[i][1], shapes[i][2], bits);
    std::printf("check: %d launches, %d failed\n", launches_, failed_);
    return failed_ == 0;
  }

 private:
  int sm_count_;
  bool few_ = false;
  int launches_ = 0;
  int failed_ = 0;

  void check_shape(int m, int n, int k, int bits) {
    DeviceArray<int8_t> x(int64_t{m} * k);
    DeviceArray<uint8_t> w(int64_t{n} * k * bits / 8), prepacked(prepacked_bytes(n, k, bits));
    DeviceArray<uint8_t> back(int64_t{n} * k * bits / 8);
    DeviceArray<float> weight_scale(n), bias(n), scales(2);
    DeviceArray<__half> residual(int64_t{m} * n);
    DeviceArray<int32_t> acc(int64_t{m} * n);
    DeviceArray<uint8_t> out(int64_t{m} * n * 4), workspace(64 << 20);
    x.fill(Fill::kInt8, 60.0f, -128, 127, 1);
    w.fill(bits == 4 ? Fill::kInt4Pairs : Fill::kInt8, bits == 4 ? 3.5f : 60.0f,
           bits == 4 ? -8 : -128, bits == 4 ? 7 : 127, 2);
    weight_scale.fill(Fill::kFloatPositive, 0.01f, 0, 0, 3);
    scales.fill(Fill::kFloatPositive, 0.02f, 0, 0, 4);
    bias.fill(Fill::kFloatPositive, 1.0f, 0, 0, 5);
    residual.fill(Fill::kHalf, 3.0f, 0, 0, 6);
    PQ_CUDA_CHECK(cudaMemset(workspace.data, 0, workspace.size));
    if (bits == 4) {
      launch_prepack_w4(w.data, prepacked.data, n, k, nullptr);
      launch_unpack_prepacked_w4(prepacked.data, back.data, n, k, nullptr);
    } else {
      launch_prepack_w8(reinterpret_cast<int8_t*>(w.data), prepacked.data, n, k, nullptr);
      launch_unpack_prepacked_w8(prepacked.data, reinterpret_cast<int8_t*>(back.data), n, k,
                                 nullptr);
    }
    reference_kernel<<<div_up(m * n, 256), 256>>>(x.data, w.data, bits, acc.data, m, n, k);
    std::vector<uint8_t> host_w = download(w.data, w.size), host_back = download(back.data, w.size);
    std::vector<uint8_t> host_packed = download(prepacked.data, prepacked.size);
    std::vector<uint8_t> expected_packed(prepacked.size);
    if (bits == 4)
      prepack_w4_host(host_w.data(), expected_packed.data(), n, k);
    else
      prepack_w8_host(reinterpret_cast<int8_t*>(host_w.data()), expected_packed.data(), n, k);
    if (host_w != host_back || host_packed != expected_packed) {
      std::printf("FAIL prepack w%d n %d k %d\n", bits, n, k);
      ++failed_;
    }
    const std::vector<int32_t> sums = download(acc.data, acc.size);
    const std::vector<float> ws = download(weight_scale.data, n), b = download(bias.data, n);
    const std::vector<float> sc = download(scales.data, 2);
    const std::vector<__half> res = download(residual.data, residual.size);

    GemmW4Params p;
    p.x = x.data, p.x_row_stride = k, p.weight = prepacked.data, p.weight_bits = bits;
    p.weight_scale = weight_scale.data, p.input_scale = scales.data;
    p.out = out.data, p.m = m, p.n = n, p.k = k, p.workspace = workspace.data;
    const GemmW4Shape shape{m, n, k, bits};
    for (const TileChoice& tile : tiles(bits)) {
      for (const GemmW4Config& config : spreads(shape, tile, sm_count_)) {
        if (gemm_w4_sm90_workspace_bytes(shape, config) > size_t(workspace.size)) continue;
        // 0: int32, 1: float32 + bias, 2: float16, 3: bfloat16 + bias, 4: + residual, 5: SwiGLU,
        // 6: quantize, 7: SwiGLU + quantize
        for (int mode = 0; mode < 8; ++mode) {
          if ((mode == 5 || mode == 7) && n % 2 != 0) continue;
          if (few_ && mode != 0 && mode != 4 && mode != 7) continue;
          // The host compares: every epilogue on the small shapes, sums and float16 on all.
          if (mode != 0 && mode != 2 && int64_t{m} * n > 120000) continue;
          static const GemmDtype dtypes[8] = {
              GemmDtype::kInt32,   GemmDtype::kFloat32, GemmDtype::kFloat16,  GemmDtype::kBFloat16,
              GemmDtype::kFloat16, GemmDtype::kFloat16, GemmDtype::kBFloat16, GemmDtype::kFloat16};
          p.out_dtype = dtypes[mode];
          p.bias = mode == 1 || mode == 3 || mode == 4 ? bias.data : nullptr;
          p.swiglu = mode == 5 || mode == 7;
          const int n_out = p.swiglu ? n / 2 : n;
          p.residual = mode == 4 ? residual.data : nullptr;
          p.out_row_stride = p.residual_row_stride = n_out;
          p.output_scale = mode >= 6 ? scales.data + 1 : nullptr;
          p.output_qmin = mode == 7 ? -8 : -128, p.output_qmax = mode == 7 ? 7 : 127;
          PQ_CUDA_CHECK(cudaMemset(out.data, 0xA5, out.size));
          launch_gemm_w4_sm90(p, config, nullptr);
          PQ_CUDA_CHECK(cudaDeviceSynchronize());
          ++launches_;
          const std::vector<uint8_t> got = download(out.data, out.size);
          const Failure f = compare(got, sums, ws, b, sc, res, p);
          if (f.count == 0) continue;
          ++failed_;
          if (failed_ < 40)
            std::cout << "FAIL w" << bits << " m " << m << " n " << n << " k " << k << " mode "
                      << mode << " " << config << ": " << f.count << " wrong, first at "
                      << f.first / n_out << "," << f.first % n_out << std::endl;
        }
      }
    }
  }

  static Failure compare(const std::vector<uint8_t>& got, const std::vector<int32_t>& sums,
                         const std::vector<float>& ws, const std::vector<float>& b,
                         const std::vector<float>& sc, const std::vector<__half>& residual,
                         const GemmW4Params& p) {
    Failure f;
    const int n_out = p.swiglu ? p.n / 2 : p.n;
    const auto linear = [&](int64_t row, int channel) {
      volatile float scale = sc[0] * ws[channel];
      volatile float y = static_cast<float>(sums[row * p.n + channel]) * scale;
      if (p.bias != nullptr) y = y + b[channel];
      return p.out_dtype == GemmDtype::kFloat32 ? float(y) : round16(y, p.out_dtype);
    };
    for (int64_t i = 0; i < int64_t{p.m} * n_out; ++i) {
      const int64_t row = i / n_out;
      const int channel = static_cast<int>(i % n_out);
      bool ok;
      if (p.out_dtype == GemmDtype::kInt32) {
        ok = reinterpret_cast<const int32_t*>(got.data())[i] == sums[i];
      } else {
        float y, tolerance = 0.0f;
        if (p.swiglu) {
          const float gate = linear(row, 2 * channel), up = linear(row, 2 * channel + 1);
          y = round16(gate / (1.0f + std::exp(-gate)) * up, p.out_dtype);
          tolerance = std::fabs(y) * 1e-3f + 1e-7f;  // one ulp of float16: exp is approximate
        } else {
          y = linear(row, channel);
        }
        if (p.residual != nullptr) y = round16(y + __half2float(residual[i]), p.out_dtype);
        float value;
        if (p.output_scale != nullptr) {
          volatile float reciprocal = 1.0f / sc[1];
          volatile float q = y * reciprocal;
          y = std::min(std::max(std::nearbyint(float(q)), float(p.output_qmin)),
                       float(p.output_qmax));
          value = reinterpret_cast<const int8_t*>(got.data())[i];
          if (tolerance > 0.0f) tolerance = 1.0f;  // a float16 ulp may cross a rounding tie
        } else if (p.out_dtype == GemmDtype::kFloat32) {
          value = reinterpret_cast<const float*>(got.data())[i];
        } else if (p.out_dtype == GemmDtype::kFloat16) {
          value = __half2float(reinterpret_cast<const __half*>(got.data())[i]);
        } else {
          value = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(got.data())[i]);
        }
        ok = std::fabs(value - y) <= tolerance || value == y;
      }
      if (!ok && f.count++ == 0) f.first = i;
    }
    return f;
  }

  template <typename T>
  static std::vector<T> download(const T* device, int64_t count) {
    std::vector<T> host(count);
    PQ_CUDA_CHECK(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
};

// ---------------------------------------------------------------- timing

constexpr int kShapes[][2] = {{6144, 4096},  {4096, 4096}, {28672, 4096}, {4096, 14336},
                              {10240, 8192}, {8192, 8192}, {57344, 8192}, {8192, 28672}};
constexpr int kMaxM = 8192;

// Buffers for all shapes; weights are a pool in which each launch takes the next window.
struct Bench {
  cudaStream_t stream;
  DeviceArray<uint8_t> weights{int64_t{1} << 30};  // 16-bit weights of the largest shape fit
  DeviceArray<uint8_t> x{int64_t{kMaxM} * 28672 * 2};
  DeviceArray<uint8_t> out{int64_t{kMaxM} * 57344 * 2};
  DeviceArray<uint8_t> workspace{int64_t{256} << 20};
  DeviceArray<float> weight_scale{57344}, input_scale{1};
  float milliseconds = 8.0f;

  Bench() {
    PQ_CUDA_CHECK(cudaStreamCreate(&stream));
    PQ_CUDA_CHECK(cudaMemset(workspace.data, 0, workspace.size));
    weight_scale.fill(Fill::kFloatPositive, 0.01f, 0, 0, 3);
    input_scale.fill(Fill::kFloatPositive, 0.02f, 0, 0, 4);
  }

  // Median microseconds of a launch. `launch(window)` enqueues one launch on `stream`.
  template <typename Launch>
  float time(const Launch& launch, int64_t weight_bytes, double macs) {
    const int64_t stride = (weight_bytes + 1023) / 1024 * 1024;
    const int windows =
        static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(weights.size / stride, 16)));
    launch(weights.data);  // plans and first-use work stay out of the graph
    PQ_CUDA_CHECK(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    PQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const int launches = macs > 5e10 ? 4 : 16;
    for (int i = 0; i < launches; ++i) launch(weights.data + (i % windows) * stride);
    PQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    PQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    cudaEvent_t begin, end;
    PQ_CUDA_CHECK(cudaEventCreate(&begin));
    PQ_CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> samples;
    float total = 0.0f;
    PQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    while (samples.size() < 3 || (total < milliseconds && samples.size() < 1000)) {
      PQ_CUDA_CHECK(cudaEventRecord(begin, stream));
      PQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
      PQ_CUDA_CHECK(cudaEventRecord(end, stream));
      PQ_CUDA_CHECK(cudaEventSynchronize(end));
      float ms;
      PQ_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
      samples.push_back(ms * 1000.0f / launches);
      total += ms;
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
  }

  void fill_integers(int bits, int activation_bits) {
    const float limit = bits == 4 ? 7.0f : 127.0f;
    // 2.7 sigma at the end of the grid, as a grid-searched scale has it.
    weights.fill(bits == 4 ? Fill::kInt4Pairs : Fill::kInt8, limit / 2.7f, bits == 4 ? -8 : -128,
                 bits == 4 ? 7 : 127, 11);
    const float x_limit = activation_bits == 4 ? 7.0f : 127.0f;
    x.fill(Fill::kInt8, x_limit / 3.5f, -static_cast<int>(x_limit) - 1, static_cast<int>(x_limit),
           12, x.size / 2);
  }
  void fill_half() {
    weights.fill(Fill::kHalf, 0.02f, 0, 0, 13, weights.size / 2);
    x.fill(Fill::kHalf, 1.0f, 0, 0, 14, x.size / 2);
  }

  enum class Epilogue { kPlain, kResidual, kSwiglu, kSwigluQuantize };
  float time_ours(const GemmW4Shape& s, const GemmW4Config& config,
                  Epilogue epilogue = Epilogue::kPlain) {
    if (gemm_w4_sm90_workspace_bytes(s, config) > size_t(workspace.size)) return 1e9f;
    // Timed launches reuse one workspace on one stream, as a model does.
    PQ_CUDA_CHECK(cudaMemset(workspace.data, 0, 1 << 20));
    GemmW4Params p;
    p.x = reinterpret_cast<int8_t*>(x.data), p.x_row_stride = s.k, p.weight_bits = s.weight_bits;
    p.weight_scale = weight_scale.data, p.input_scale = input_scale.data;
    p.out = out.data, p.out_row_stride = s.n, p.out_dtype = GemmDtype::kFloat16;
    p.m = s.m, p.n = s.n, p.k = s.k, p.workspace = workspace.data;
    if (epilogue == Epilogue::kResidual) p.residual = out.data, p.residual_row_stride = s.n;
    p.swiglu = epilogue == Epilogue::kSwiglu || epilogue == Epilogue::kSwigluQuantize;
    if (p.swiglu) p.out_row_stride = s.n / 2;
    if (epilogue == Epilogue::kSwigluQuantize) p.output_scale = input_scale.data;
    return time(
        [&](const uint8_t* window) {
          p.weight = window;
          launch_gemm_w4_sm90(p, config, stream);
        },
        prepacked_bytes(s.n, s.k, s.weight_bits), double(s.m) * s.n * s.k);
  }
  float time_peer(const PeerLaunch& peer, int m, int n, int k, int element_bytes) {
    return time([&](const uint8_t* window) { peer(x.data, window, out.data, m, n, k, stream); },
                int64_t{n} * k * element_bytes, double(m) * n * k);
  }
};

double tops(int m, int n, int k, float us) { return 2.0 * m * n * k / us * 1e-6; }

void sweep(Bench& bench, int bits, int sm_count, const std::vector<int>& ms) {
  bench.fill_integers(bits, 8);
  for (const auto& s : kShapes) {
    for (int m : ms) {
      std::vector<std::pair<float, GemmW4Config>> results;
      const GemmW4Shape shape{m, s[0], s[1], bits};
      for (const TileChoice& tile : tiles(bits)) {
        if (tile.tokens > 16 && tile.tokens >= 2 * m) continue;  // more than half padding
        if (m > 8 * tile.tokens && tile.tokens < 128) continue;
        for (const GemmW4Config& config : spreads(shape, tile, sm_count))
          results.emplace_back(bench.time_ours(shape, config), config);
      }
      for (const auto& [us, c] : results)
        std::printf("%d %d %d %d | %d %d %d %d %d %d | %.2f\n", bits, m, s[0], s[1], c.block_rows,
                    c.block_tokens, c.cluster, c.split_k, c.grid, c.stream_k_tiles, us);
      std::fflush(stdout);
    }
  }
}

void compare_with_peers(Bench& bench, int bits, int sm_count, const std::vector<int>& ms) {
  struct Row {
    float ours4 = 0, ours8 = 0, fp16 = 0, int8 = 0;
    GemmW4Config config;
  };
  const int shape_count = sizeof(kShapes) / sizeof(kShapes[0]);
  std::vector<Row> rows(ms.size() * shape_count);
  // A peer that cannot run leaves zeros in its column, and says why.
  const auto each = [&](auto&& body) {
    try {
      for (int s = 0; s < shape_count; ++s)
        for (size_t i = 0; i < ms.size(); ++i)
          body(rows[s * ms.size() + i], ms[i], kShapes[s][0], kShapes[s][1]);
    } catch (const std::exception& error) {
      std::printf("peer dropped: %s\n", error.what());
      cudaGetLastError();
    }
  };
  const PeerLaunch fp16 = make_cublaslt_fp16();
  const PeerLaunch large = make_cutlass_int8_128x256(), small = make_cutlass_int8_128x128();
  if (fp16) {
    bench.fill_half();
    each([&](Row& r, int m, int n, int k) { r.fp16 = bench.time_peer(fp16, m, n, k, 2); });
  }
  // CUTLASS int8 sees the values that ours sees: int4 grid for 4-bit weights, A8 activations.
  const auto run_ours = [&](int activation_bits) {
    bench.fill_integers(bits, activation_bits);
    each([&](Row& r, int m, int n, int k) {
      const GemmW4Shape shape{m, n, k, bits};
      r.config = choose_gemm_w4_sm90_config(shape, sm_count);
      (activation_bits == 4 ? r.ours4 : r.ours8) = bench.time_ours(shape, r.config);
    });
  };
  if (bits == 4) run_ours(4);
  run_ours(8);
  bench.weights.fill(Fill::kInt8, (bits == 4 ? 7.0f : 127.0f) / 2.7f, bits == 4 ? -8 : -128,
                     bits == 4 ? 7 : 127, 11);
  each([&](Row& r, int m, int n, int k) {
    r.int8 = bench.time_peer(large, m, n, k, 1);
    if (m <= 512) r.int8 = std::min(r.int8, bench.time_peer(small, m, n, k, 1));
  });
  std::printf(
      "w%d, us: n k m | fp16 cutlass-int8 | ours(a4) ours(a8) TOPS(a8) | x fp16, x int8 (a8) | "
      "config\n",
      bits);
  std::vector<double> log_fp16(ms.size()), log_int8(ms.size());
  each([&](Row& r, int m, int n, int k) {
    const size_t column = (&r - rows.data()) % ms.size();
    log_fp16[column] += std::log(r.fp16 / r.ours8);
    log_int8[column] += std::log(r.int8 / r.ours8);
    std::printf("%d %d %d | %.1f %.1f | %.1f %.1f %.0f | %.2f %.2f | %dx%d c%d s%d g%d sk%d\n", n,
                k, m, r.fp16, r.int8, r.ours4, r.ours8, tops(m, n, k, r.ours8), r.fp16 / r.ours8,
                r.int8 / r.ours8, r.config.block_rows, r.config.block_tokens, r.config.cluster,
                r.config.split_k, r.config.grid, r.config.stream_k_tiles);
  });
  for (size_t i = 0; i < ms.size(); ++i)
    std::printf("geomean m %d: x fp16 %.2f  x cutlass int8 %.2f\n", ms[i],
                std::exp(log_fp16[i] / shape_count), std::exp(log_int8[i] / shape_count));
}

// The fused epilogues against the plain one: what they cost inside the GEMM.
void compare_epilogues(Bench& bench, int bits, int sm_count, const std::vector<int>& ms) {
  bench.fill_integers(bits, 8);
  std::printf("w%d, us: n k m | plain + residual, swiglu, swiglu + quantize\n", bits);
  for (const auto& s : kShapes) {
    for (int m : ms) {
      const GemmW4Shape shape{m, s[0], s[1], bits};
      const GemmW4Config config = choose_gemm_w4_sm90_config(shape, sm_count);
      std::printf("%d %d %d |", s[0], s[1], m);
      for (const auto epilogue : {Bench::Epilogue::kPlain, Bench::Epilogue::kResidual,
                                  Bench::Epilogue::kSwiglu, Bench::Epilogue::kSwigluQuantize})
        std::printf(" %.1f", bench.time_ours(shape, config, epilogue));
      std::printf("\n");
    }
  }
}

std::vector<int> parse_list(const char* text) {
  std::vector<int> values;
  for (const char* p = text; *p;) {
    values.push_back(std::atoi(p));
    p = std::strchr(p, ',');
    if (p == nullptr) break;
    ++p;
  }
  return values;
}

}  // namespace
}  // namespace prefixquant::bench

int main(int argc, char** argv) try {
  using namespace prefixquant::bench;
  const std::string mode = argc > 1 ? argv[1] : "check";
  const int bits = argc > 2 ? std::atoi(argv[2]) : 4;
  const std::vector<int> ms = parse_list(argc > 3 ? argv[3] : "16,64,256,1024,4096");
  cudaDeviceProp properties;
  PQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d SMs\n", properties.name, properties.multiProcessorCount);
  if (mode == "check" || mode == "check-few")
    return Checker(properties.multiProcessorCount).run(mode == "check-few") ? 0 : 1;
  Bench bench;
  if (argc > 4) bench.milliseconds = static_cast<float>(std::atof(argv[4]));
  if (mode == "epilogues")
    compare_epilogues(bench, bits, properties.multiProcessorCount, ms);
  else if (mode == "sweep")
    sweep(bench, bits, properties.multiProcessorCount, ms);
  else
    compare_with_peers(bench, bits, properties.multiProcessorCount, ms);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
