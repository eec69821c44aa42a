// SPDX-License-Identifier: Apache-2.0
//
// Hadamard, alone and with SwiGLU and quantization, without Python.
//   bench_hadamard check [k [2^m]] small self-checking launches of every kernel (of these blocks),
//                                  for compute-sanitizer
//   bench_hadamard few [k [2^m]]   fewer of them, for its slower tools
//   bench_hadamard time            microseconds and shares of the copy bandwidth, back to back;
//                                  for few rows also what a launch adds between two linear layers
//   bench_hadamard sweep [k>N] [chosen] [b=block,..] [rows..]  the same for every configuration,
//                                  or the chosen one, and these blocks; HadamardSums::few,
//                                  few_thousands and HadamardPairBlock::many are from it
//   bench_hadamard                 check on larger sizes, then time
#include <cuda_bf16.h>

#include <cstdio>
#include <exception>
#include <string>

#include "hadamard_problem.h"
#include "harness.h"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/hadamard.h"
#include "prefixquant/launch.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant::bench {
namespace {

// Launches every configuration, or where wgmma_ctas > 0 only kWgmma with so many CTAs; returns how
// many are wrong.
int check(const Case& c, int& launches, int64_t wgmma_ctas = 0) {
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
  RowHadamardParams p;
  p.x = x_device.data(), p.x_stride = c.cols, p.dtype = RowDtype::kBFloat16;
  if (c.swiglu) p.up = up_device.data(), p.up_stride = c.cols;
  p.scaling = c.scaling, p.scale = scale.data(), p.row_scale = row_scale.data();
  p.signs = c.k > 1 ? signs_device.data() : nullptr;
  p.block_size = c.block, p.k = c.k, p.rows = c.rows, p.cols = c.cols;
  const Expected expected = expected_of(c, x, up, signs, p.qmax);
  const Buffer<uint8_t> probe(1);  // aligned as every other buffer
  p.out = probe.data();
  int failed = 0;
  auto configs = configs_of(p);
  if (wgmma_ctas > 0) {
    configs = {hadamard_wgmma_config(p, true, current_hadamard_device())};
    configs[0].grid = std::min(configs[0].grid, wgmma_ctas);
  }
  for (const HadamardConfig& config : configs) {
    const Buffer<uint8_t> out(c.scaling == RowScale::kNone ? 2 * count : count);
    p.out = out.data();
    launch_hadamard(p, config, nullptr);
    PQ_CUDA_CHECK(cudaDeviceSynchronize());
    int ties = 0;
    const int wrong = wrong_of(c, p, expected, out.host(), row_scale.host(), ties);
    ++launches;
    if (wrong == 0 && ties <= 1 + 1e-4 * count) continue;
    ++failed;
    std::printf(
        "rows %lld cols %lld block %lld k %d swiglu %d scaling %d flipped %d %s: %d wrong, "
        "%d at ties\n",
        static_cast<long long>(c.rows), static_cast<long long>(c.cols),
        static_cast<long long>(c.block), c.k, c.swiglu, static_cast<int>(c.scaling),
        c.flipped_signs, text_of(config).c_str(), wrong, ties);
  }
  return failed;
}

constexpr RowScale kNone = RowScale::kNone, kStatic = RowScale::kStatic,
                   kDynamic = RowScale::kDynamic;

enum class Size { kFew, kSmall, kLarge };

// only_k, only_pow2: 0 for all
int check_all(Size size, int only_k, int64_t only_pow2) {
  int failed = 0, launches = 0;
  const bool small = size != Size::kLarge, few = size == Size::kFew;
  const auto run = [&](Case c) {
    if (only_k && c.k != only_k) return;
    if (only_pow2 && c.block != c.k * only_pow2) return;
    for (const int64_t rows : {1, small ? 3 : 5, 300}) {
      if (rows == 300 && (small || c.cols > 4096)) continue;
      const bool walks = c.cols == 28672 || find_hadamard_pair_block(c.k, c.block / c.k);
      if (few && rows > 1 && c.cols > 2048 && !walks) continue;
      c.rows = rows;
      for (const RowScale scaling : {kNone, kStatic, kDynamic}) {
        for (const bool swiglu : {false, true}) {
          c.scaling = scaling, c.swiglu = swiglu;
          if ((scaling == kNone && swiglu) || (few && scaling != kNone && !swiglu)) continue;
          failed += check(c, launches);
        }
      }
    }
  };
  for (const int64_t block : {1, 2, 4, 8, 64, 256, 512, 1024, 2048, 8192, 16384, 32768}) {
    if (few && block != 8 && block != 512 && block != 8192 && block != 16384) continue;
    run({0, block * (block < 64 ? 48 : 1), block, 1, false, kNone});
  }
  run({0, 4096, 256, 1, false, kNone});
  std::vector<int> sizes = {64,  68,  76,  84,  96,  108, 128,  // sums of integers
                            132, 148, 160, 172, 188, 192, 200};
  for (const HadamardSums& sums : kHadamardSums) sizes.push_back(sums.k);
  for (const int k : sizes) {
    if (k == 1) continue;
    for (const int64_t pow2 : {2, 8, 16, 32, 64, 128, 256, 512}) {
      if (k * pow2 > 56000 || (k <= 60 && (pow2 == 16 || pow2 == 128 || pow2 == 256))) continue;
      if (small && pow2 > 64 && k > 28 && (k <= 60 || (k > 108 && pow2 > 128))) continue;
      if (few && !find_hadamard_pair_block(k, pow2) &&
          ((k % 3 != 1 && k != 96) || pow2 == 16 || pow2 == 32 || pow2 == 2 ||
           (k > 60 && pow2 > 64)))
        continue;
      run({0, k * pow2 * (pow2 < 64 ? 2 : 1), k * pow2, k, false, kNone});
    }
  }
  if ((!only_k || only_k == 108) && (!only_pow2 || only_pow2 == 256)) {
    // CTAs that walk, each with a staged x.
    for (const bool swiglu : {false, true}) {
      failed += check({10, 27648, 27648, 108, swiglu, swiglu ? kStatic : kNone}, launches, 4);
    }
    // Two rounds of the SMs, and four rows that are another launch.
    const int64_t rows = 2 * current_hadamard_device().sm_count + 4;
    if (!few) {
      failed += check({rows, 27648, 27648, 108, true, kStatic}, launches);
      failed += check({rows, 27648, 27648, 108, true, kDynamic}, launches);
      failed += check({rows, 27648, 27648, 108, false, kNone}, launches);
    }
  }
  run({0, 28672, 28672, 28, false, kNone});
  run({0, 28 * 128, 28 * 64, 28, false, kNone, true});
  run({0, 172 * 64, 172 * 64, 172, false, kNone, true});
  std::printf("%d launches, %d wrong\n", launches, failed);
  return failed;
}

RowHadamardParams params_of(const Case& c, const __nv_bfloat16* gate_up, void* out,
                            const int8_t* signs, const float* scale, float* row_scale) {
  RowHadamardParams p;
  const int64_t stride = c.swiglu ? 2 * c.cols : c.cols;
  p.x = gate_up, p.x_stride = stride, p.dtype = RowDtype::kBFloat16;
  if (c.swiglu) p.up = gate_up + c.cols, p.up_stride = stride;
  p.out = out, p.scaling = c.scaling, p.scale = scale, p.row_scale = row_scale;
  p.signs = c.k > 1 ? signs : nullptr;
  p.block_size = c.block, p.k = c.k, p.rows = c.rows, p.cols = c.cols;
  return p;
}

// Microseconds of each configuration, launched back to back on operands out of the L2 cache.
std::vector<double> time_back_to_back(const Case& c, const std::vector<HadamardConfig>& configs) {
  const size_t count = c.rows * c.cols, inputs = c.swiglu ? 2 * count : count;
  const int copies = std::min(64, copies_out_of_l2(2 * inputs + count));
  std::vector<Buffer<__nv_bfloat16>> x;
  std::vector<Buffer<uint8_t>> out;
  const auto values = to_bf16(normal_rows(std::min<int64_t>(c.rows, 16), 2 * c.cols, false));
  for (int i = 0; i < copies; ++i) {
    x.emplace_back(inputs), out.emplace_back(2 * count);
    x[i].repeat(values);
  }
  const Buffer<int8_t> signs(signs_of(c.k));
  const Buffer<float> scale(std::vector<float>{0.37f}), row_scale(c.rows);
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<double> us;
  for (const HadamardConfig& config : configs) {
    us.push_back(time_us(copies, [&](int i, cudaStream_t stream) {
      launch_hadamard(
          params_of(c, x[i].data(), out[i].data(), signs.data(), scale.data(), row_scale.data()),
          config, stream);
    }));
  }
  return us;
}

// A linear layer of 4-bit weights as a decoder has before and after, three copies of its weights.
class Linear {
 public:
  Linear(int m, int n, int k, const int8_t* x, void* out)
      : scales_(std::vector<float>(n, 1e-4f)), workspace_(std::vector<uint8_t>(1 << 26, 0)) {
    const CurrentDevice current;
    const GemmW4Shape shape{m, n, k, 4, 8};
    config_ = choose_gemm_w4_config(shape, current.sm_count, current.arch);
    PQ_REQUIRE(gemm_w4_workspace_bytes(shape, config_) <= workspace_.size(), "workspace");
    for (int i = 0; i < 3; ++i) weights_.emplace_back(prepacked_bytes(n, k, 4));
    params_.x = x, params_.x_row_stride = k;
    params_.weight_scale = params_.input_scale = scales_.data();
    params_.out = out, params_.out_row_stride = n, params_.out_dtype = GemmDtype::kBFloat16;
    params_.m = m, params_.n = n, params_.k = k;
    params_.workspace = workspace_.data(), params_.weight_is_constant = true;
  }
  void launch(int i, cudaStream_t stream) const {
    GemmW4Params p = params_;
    p.weight = weights_[i].data();
    launch_gemm_w4(p, config_, stream);
  }

 private:
  Buffer<float> scales_;
  Buffer<uint8_t> workspace_;
  std::vector<Buffer<uint8_t>> weights_;
  GemmW4Params params_;
  GemmW4Config config_;
};

// What each configuration adds to a layer's gate_up and down projections (hidden size 4096), whose
// weights pass through the caches in between.
std::vector<double> time_between(const Case& c, const std::vector<HadamardConfig>& configs) {
  const int rows = static_cast<int>(c.rows), cols = static_cast<int>(c.cols);
  const Buffer<int8_t> x(c.rows * 4096), levels(c.rows * c.cols);
  const Buffer<__nv_bfloat16> gate_up(2 * c.rows * c.cols), y(c.rows * 4096);
  const Linear up(rows, 2 * cols, 4096, x.data(), gate_up.data());
  const Linear down(rows, 4096, cols, levels.data(), y.data());
  const Buffer<int8_t> signs(signs_of(c.k));
  const Buffer<float> scale(std::vector<float>{0.37f}), row_scale(c.rows);
  const RowHadamardParams p =
      params_of(c, gate_up.data(), levels.data(), signs.data(), scale.data(), row_scale.data());
  const auto layer_us = [&](const HadamardConfig* config) {
    return time_us(3, [&](int i, cudaStream_t stream) {
      up.launch(i, stream);
      if (config) launch_hadamard(p, *config, stream);
      down.launch(i, stream);
    });
  };
  std::vector<double> us;
  const double without = layer_us(nullptr);
  for (const HadamardConfig& config : configs) us.push_back(layer_us(&config) - without);
  return us;
}

void time_case(Case c, RowScale scaling, bool swiglu, double copy, bool sweep) {
  c.scaling = scaling, c.swiglu = swiglu;
  const Buffer<uint8_t> probe(1);  // aligned as every other buffer
  const auto* any = reinterpret_cast<const __nv_bfloat16*>(probe.data());
  auto configs = configs_of(
      params_of(c, any, probe.data(), reinterpret_cast<int8_t*>(probe.data()), nullptr, nullptr));
  if (!sweep) configs.resize(1);
  const double bytes = (2.0 * (swiglu ? 2 : 1) + (scaling == kNone ? 2 : 1)) * c.rows * c.cols;
  const auto us = time_back_to_back(c, configs);
  const bool few = c.rows <= 256 && swiglu && scaling == kStatic && c.cols % 64 == 0;
  const auto between = few ? time_between(c, configs) : std::vector<double>(configs.size());
  for (size_t i = 0; i < configs.size(); ++i) {
    std::printf("%-6s %-7s %5lld x %5lld block %5lld (k %3d)  %8.2f us  %5.1f %% of copy",
                swiglu ? "swiglu" : "plain",
                scaling == kNone     ? "float"
                : scaling == kStatic ? "static"
                                     : "dynamic",
                static_cast<long long>(c.rows), static_cast<long long>(c.cols),
                static_cast<long long>(c.block), c.k, us[i], 100.0 * bytes / us[i] * 1e6 / copy);
    if (few) std::printf("  adds %6.2f us", between[i]);
    std::printf("  %s\n", text_of(configs[i]).c_str());
  }
  std::fflush(stdout);
}

struct Block {
  int64_t block;
  int k;
};
constexpr Block kBlocks[] = {{1536, 12},   {4864, 76},   {8192, 1},    {8960, 140}, {9728, 76},
                             {11008, 172}, {12288, 12},  {13824, 108}, {14336, 28}, {17408, 68},
                             {18944, 148}, {27648, 108}, {28672, 28}};

void time_all() {
  const double copy = copy_bandwidth();
  std::printf("device copy: %.3f TB/s\n", copy * 1e-12);
  for (const Block& b : kBlocks) {
    const auto run = [&](int64_t rows, RowScale scaling, bool swiglu) {
      time_case({rows, b.block, b.block, b.k, swiglu, scaling}, scaling, swiglu, copy, false);
    };
    for (const int64_t rows : {1, 16, 64, 256, 4096, 16384}) run(rows, kStatic, true);
    for (const int64_t rows : {1, 4096}) run(rows, kDynamic, true);
    run(4096, kNone, false);
  }
  for (const int64_t block : {1, 128, 256, 512, 1024}) {
    for (const int64_t rows : {1, 4096}) {
      time_case({rows, 14336, block, 1, true, kStatic}, kStatic, true, copy, false);
    }
  }
}

// blocks: ",block,..," or empty for all
void time_sweep(int above, const std::string& blocks, bool all_configs,
                const std::vector<int64_t>& rows_list) {
  const double copy = copy_bandwidth();
  std::printf("device copy: %.3f TB/s\n", copy * 1e-12);
  for (const Block& b : {Block{14336, 28},
                         {28672, 28},
                         {20480, 20},
                         {22528, 44},
                         {36864, 36},
                         {53248, 52},
                         {8192, 1},
                         {1536, 12},
                         {5120, 20},
                         {9216, 36},
                         {7680, 60},
                         {4864, 76},
                         {13824, 108},
                         {8960, 140},
                         {18944, 148},
                         {11008, 172},
                         {9728, 76},
                         {17408, 68},
                         {27648, 108}}) {
    const std::string name = "," + std::to_string(b.block) + ",";
    if (b.k <= above || (!blocks.empty() && blocks.find(name) == std::string::npos)) continue;
    for (const int64_t rows : rows_list) {
      time_case({rows, b.block, b.block, b.k, true, kStatic}, kStatic, true, copy, all_configs);
    }
  }
}

}  // namespace
}  // namespace prefixquant::bench

int main(int argc, char** argv) try {
  using namespace prefixquant::bench;
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "sweep") {
    std::vector<int64_t> rows;
    std::string blocks;
    bool all_configs = true;
    int above = 0;
    for (int i = 2; i < argc; ++i) {
      const std::string word = argv[i];
      if (word.rfind("k>", 0) == 0) {
        above = std::stoi(word.substr(2));
      } else if (word.rfind("b=", 0) == 0) {
        blocks = "," + word.substr(2) + ",";
      } else if (word == "chosen") {
        all_configs = false;
      } else {
        rows.push_back(std::stoll(word));
      }
    }
    if (rows.empty()) rows = {1, 16, 64, 256, 1024, 4096};
    time_sweep(above, blocks, all_configs, rows);
    return 0;
  }
  const int only_k = argc > 2 ? std::stoi(argv[2]) : 0;
  const int64_t only_pow2 = argc > 3 ? std::stoll(argv[3]) : 0;
  const Size size = mode == "few" ? Size::kFew : mode == "check" ? Size::kSmall : Size::kLarge;
  if (mode != "time" && check_all(size, only_k, only_pow2)) return 1;
  if (mode.empty() || mode == "time") time_all();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
