// SPDX-License-Identifier: Apache-2.0
//
// Small self-checking launches of every kernel family, made for compute-sanitizer; needs no Python.
//   bench_gemv_w4 [mma|mma_int4|wgmma|stream]...     (default: all that the device has)
//   compute-sanitizer --tool memcheck|racecheck|synccheck bench_gemv_w4 mma
// Buffers have exactly the sizes that the interface asks for, so that memcheck sees a byte too
// many.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "prefixquant/check.h"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant::bench {
namespace {

struct Shape {
  int m, n, k;
};
constexpr Shape kShapes[] = {{1, 64, 64},    {1, 100, 576},  {3, 40, 1536},   {8, 136, 4096},
                             {17, 257, 576}, {33, 128, 200}, {64, 300, 2048}, {137, 144, 640}};

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* device = nullptr;
  PQ_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device), host.size() * sizeof(T)));
  PQ_CUDA_CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

// The configs of a family to launch: its own choice, and those that small shapes would not get.
std::vector<GemmW4Config> configs_of(const std::string& family, const GemmW4Shape& shape,
                                     int sm_count) {
  if (family == "mma_int4") return {choose_gemm_w4_sm80_config(shape, sm_count)};
  if (family == "mma") return {choose_gemm_w4_mma_config(shape, sm_count, 90)};
  if (family == "stream") {
    std::vector<GemmW4Config> configs = {choose_gemm_w4_stream_config(shape, sm_count)};
    if (configs[0].stages == 0) configs.clear();  // the choice is another kernel
    GemmW4Config split;                           // a ring that goes round, a split, a late release
    split.kernel = GemmW4Kernel::kGemvStream;
    split.block_rows = 64, split.block_tokens = kGemvStreamTokens;
    split.stages = split.split_k = split.cluster = split.release_stages = 2;
    configs.push_back(split);
    return configs;
  }
  GemmW4Config shared;  // clusters of two that share the activations, whole tiles
  shared.block_tokens = 64;
  shared.stages = 0, shared.cluster = 2;
  const int token_tiles = (shape.m + 63) / 64;
  shared.grid = (shape.n + 255) / 256 * token_tiles * 2;
  GemmW4Config stream_k = shared;  // every tile cut in two along k
  stream_k.cluster = 1;
  stream_k.stream_k_tiles = (shape.n + 127) / 128 * token_tiles;
  stream_k.grid = 2 * stream_k.stream_k_tiles;
  std::vector<GemmW4Config> configs = {choose_gemm_w4_sm90_config(shape, sm_count)};
  if (shape.weight_bits == 4) configs.push_back(shared);  // no int8 tile of 64 tokens is shared
  if (shape.k > 128) configs.push_back(stream_k);
  return configs;
}

// Runs one shape with one config; returns the number of wrong sums.
int run(const std::string& family, const Shape& s, const GemmW4Shape& shape,
        const GemmW4Config& config) {
  const bool int4 = family == "mma_int4";
  const int bits = shape.weight_bits;
  const int k_row = (s.k + 15) / 16 * 16, x_limit = int4 ? 8 : 128, w_limit = bits == 4 ? 8 : 128;
  std::vector<int8_t> x(size_t(s.m) * k_row), w(size_t(s.n) * s.k);
  for (auto& v : x) v = static_cast<int8_t>(std::rand() % (2 * x_limit) - x_limit);
  for (auto& v : w) v = static_cast<int8_t>(std::rand() % (2 * w_limit) - w_limit);
  std::vector<uint8_t> prepacked(prepacked_bytes(s.n, s.k, bits));
  if (bits == 4) {
    std::vector<uint8_t> packed(w.size() / 2);
    for (size_t i = 0; i < packed.size(); ++i)
      packed[i] = static_cast<uint8_t>((w[2 * i] & 15) | (w[2 * i + 1] & 15) << 4);
    prepack_w4_host(packed.data(), prepacked.data(), s.n, s.k);
  } else {
    prepack_w8_host(w.data(), prepacked.data(), s.n, s.k);
  }

  std::vector<int32_t> out(size_t(s.m) * s.n, -1);
  const std::vector<float> scales(s.n, 0.5f), one(1, 1.0f);
  const std::vector<uint8_t> zeros(gemm_w4_workspace_bytes(shape, config) + 16, 0);
  GemmW4Params p;
  p.x = to_device(x), p.x_row_stride = k_row;
  p.weight = to_device(prepacked), p.weight_bits = bits;
  p.weight_scale = to_device(scales), p.input_scale = to_device(one);
  p.out = to_device(out), p.out_row_stride = s.n, p.out_dtype = GemmDtype::kInt32;
  p.m = s.m, p.n = s.n, p.k = s.k;
  p.workspace = to_device(zeros), p.weight_is_constant = true;
  launch_gemm_w4(p, config, nullptr);
  PQ_CUDA_CHECK(
      cudaMemcpy(out.data(), p.out, out.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
  // Once more through the fused epilogue, whose result only has to be addressed correctly here.
  p.out_dtype = GemmDtype::kBFloat16, p.output_scale = p.input_scale;
  launch_gemm_w4(p, config, nullptr);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());

  int wrong = 0;
  for (int m = 0; m < s.m; ++m) {
    for (int n = 0; n < s.n; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < s.k; ++k) sum += x[size_t(m) * k_row + k] * w[size_t(n) * s.k + k];
      wrong += out[size_t(m) * s.n + n] != sum;
    }
  }
  std::cout << family << " w" << bits << " " << s.m << "x" << s.n << "x" << s.k << " " << config
            << (wrong ? "  WRONG" : "  exact") << std::endl;
  for (const void* pointer :
       {static_cast<const void*>(p.x), p.weight, static_cast<const void*>(p.weight_scale),
        static_cast<const void*>(p.input_scale), static_cast<const void*>(p.out),
        static_cast<const void*>(p.workspace)})
    PQ_CUDA_CHECK(cudaFree(const_cast<void*>(pointer)));
  return wrong;
}

}  // namespace
}  // namespace prefixquant::bench

int main(int argc, char** argv) try {
  using namespace prefixquant::bench;
  int sm_count = 0, major = 0;
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, 0));
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  std::vector<std::string> families(argv + 1, argv + argc);
  if (families.empty()) families = {"mma", "mma_int4"};
  if (argc == 1 && major >= 9) families.push_back("stream");
  if (argc == 1 && major == 9) families.push_back("wgmma");
  int wrong = 0;
  for (const std::string& family : families)
    for (const Shape& s : kShapes)
      for (const int bits : {4, 8})
        if ((bits == 4 || family != "mma_int4") &&
            (s.m <= prefixquant::kGemvStreamTokens || family != "stream")) {
          const prefixquant::GemmW4Shape shape{s.m, s.n, s.k, bits, family == "mma_int4" ? 4 : 8};
          for (const auto& config : configs_of(family, shape, sm_count))
            wrong += run(family, s, shape, config);
        }
  std::cout << (wrong ? "WRONG" : "all exact") << std::endl;
  return wrong ? 1 : 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
