// SPDX-License-Identifier: Apache-2.0
//
// The KV attention kernels without Python.
//   bench_kv_attention check   every format, head dimension and cache shape against float64;
//                              unused slots are NaN or -1, unused page numbers absurd
//   bench_kv_attention small   the same on short sequences, made for compute-sanitizer
//   bench_kv_attention time    microseconds and GB/s of KV4, KV8 and KV16; caches out of L2
#include <algorithm>
#include <cstring>

#include "kv_attention_problem.cuh"

namespace prefixquant::bench {
namespace {

using Launch = void (*)(const KvAttentionGpuParams&, int, cudaStream_t);

int sm_count() {
  static const int count = cuda_device_info(0).sm_count;
  return count;
}

void launch_own(const KvAttentionGpuParams& p, int, cudaStream_t stream) {
  static const DeviceInfo device = cuda_device_info(0);
  launch_kv_attention(p, device, stream);
}

// The kernels for architectures before sm_90.
void launch_cp_async(const KvAttentionGpuParams& p, int sm_count, cudaStream_t stream) {
  launch_kv_attention(p, {sm_count, 80}, stream);
}

const char* name_of(KvDtype dtype) {
  const char* const names[] = {"int4", "int8", "float16", "bfloat16", "float32"};
  return names[static_cast<int>(dtype)];
}

bool check(const KvProblem& problem, Launch launch) {
  const KvOperands operands(problem, sm_count());
  KvError error;
  std::vector<uint8_t> first, again(operands.out_count * operands.out_bytes);
  for (int run = 0; run < 3; ++run) {  // counters must be back at zero, results the same bits
    PQ_CUDA_CHECK(cudaMemset(operands.params[0].out, 0xFF, again.size()));
    launch(operands.params[0], sm_count(), nullptr);
    PQ_CUDA_CHECK(
        cudaMemcpy(again.data(), operands.params[0].out, again.size(), cudaMemcpyDeviceToHost));
    if (run == 0) {
      error = check_output(operands, 0);
      first = again;
    }
  }
  const bool same = first == again;
  const bool good = error.finite && same && error.ours <= 2 * error.rounded + 1e-6;
  std::printf("%-8s %-44s error %.2e, of bfloat16 %.2e%s\n", good ? "ok" : "WRONG",
              problem.name.c_str(), error.ours, error.rounded, error.finite ? "" : ", NOT FINITE");
  if (!same) std::printf("         ^ NOT REPEATABLE\n");
  return good;
}

int check_all(bool small, Launch launch) {
  int wrong = 0;
  const std::vector<int> ragged =
      small ? std::vector<int>{1, 0, 17, 200} : std::vector<int>{1, 10000, 0, 17, 128, 129, 4095};
  const auto run = [&](KvProblem problem) {
    problem.name = std::string(name_of(problem.cache)) + " D " + std::to_string(problem.dim) +
                   " heads " + std::to_string(problem.kv_heads) + "x" +
                   std::to_string(problem.group) + " T " + std::to_string(problem.tokens) + " P " +
                   std::to_string(problem.prefix) + " page " + std::to_string(problem.page_size) +
                   (problem.mask ? " mask" : "") + (problem.quantize ? " int8" : "");
    wrong += !check(problem, launch);
  };
  for (KvDtype cache : {KvDtype::kInt4, KvDtype::kInt8, KvDtype::kFloat16, KvDtype::kBFloat16}) {
    for (int dim : {64, 96, 128, 256}) {
      KvProblem p;
      p.cache = cache, p.dim = dim, p.kv_heads = 2, p.group = 4, p.lengths = ragged;
      run(p);
      p.page_size = 16, p.prefix = 4, p.q = KvDtype::kFloat16;
      run(p);
      if (small) continue;
      p.page_size = 10, p.prefix = 0, p.group = 3, p.quantize = true;
      run(p);
    }
  }
  KvProblem p;
  p.kv_heads = 2;
  for (int group : {1, 7, 8, 16}) {
    p.group = group, p.lengths = ragged, p.page_size = 64;
    p.prefix_dtype = KvDtype::kFloat16, p.prefix = 11;
    run(p);
  }
  p.page_size = 0, p.group = 4;
  for (int tokens : {3, 16}) {
    p.tokens = tokens, p.lengths = {300, 16, 77};
    p.mask = false, p.prefix = 1;
    run(p);
    p.mask = true, p.prefix = 0;
    run(p);
  }
  p = KvProblem{};
  p.lengths.assign(small ? 5 : 70, 33);  // more sequences than lanes
  for (size_t i = 0; i < p.lengths.size(); ++i) p.lengths[i] = static_cast<int>(i * 37 % 301);
  p.kv_heads = 1;
  run(p);
  if (!small) {
    p.lengths = {32768}, p.kv_heads = 8;
    run(p);
  }
  std::printf("%d wrong\n", wrong);
  return wrong;
}

struct Times {
  double median, low, high;
};

// One graph of a few rotations through the caches, replayed.
Times time_launches(const KvOperands& operands, Launch launch, int rotations) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t start, end;
  PQ_CUDA_CHECK(cudaStreamCreate(&stream));
  PQ_CUDA_CHECK(cudaEventCreate(&start));
  PQ_CUDA_CHECK(cudaEventCreate(&end));
  PQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < rotations; ++i) {
    for (const KvAttentionGpuParams& p : operands.params) launch(p, sm_count(), stream);
  }
  PQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  PQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> samples;
  for (int i = 0; i < 12; ++i) {
    PQ_CUDA_CHECK(cudaEventRecord(start, stream));
    PQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    PQ_CUDA_CHECK(cudaEventRecord(end, stream));
    PQ_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    PQ_CUDA_CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i >= 3) samples.push_back(ms * 1e3 / (rotations * operands.params.size()));
  }
  PQ_CUDA_CHECK(cudaGraphExecDestroy(executable));
  PQ_CUDA_CHECK(cudaGraphDestroy(graph));
  PQ_CUDA_CHECK(cudaStreamDestroy(stream));
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.front(), samples.back()};
}

int copies_out_of_l2(int64_t bytes) {
  constexpr int64_t kFourTimesL2 = 200 << 20;
  return static_cast<int>(
      std::max<int64_t>(1, (kFourTimesL2 + bytes - 1) / std::max<int64_t>(bytes, 1)));
}

void time_one(KvDtype cache, std::vector<int> lengths, int page_size, const char* variant,
              Launch launch, int dim = 128, int kv_heads = 8, int group = 4) {
  KvProblem p;
  p.cache = cache, p.dim = dim, p.kv_heads = kv_heads, p.group = group, p.page_size = page_size;
  p.lengths = lengths;
  int64_t tokens = 0;
  for (int length : lengths) tokens += length;
  p.copies = std::min(64, copies_out_of_l2(2 * tokens * kv_heads * dim * bits_of(cache) / 8));
  const KvOperands operands(p, sm_count());
  const Times us = time_launches(operands, launch, std::max(1, 60 / p.copies));
  std::printf("%-26s %-8s D %d B %zu x %d page %d: %.2f us (%.2f .. %.2f), %.0f GB/s\n", variant,
              name_of(cache), dim, lengths.size(), lengths[0], page_size, us.median, us.low,
              us.high, operands.read_bytes / us.median * 1e-3);
  std::fflush(stdout);
}

}  // namespace
}  // namespace prefixquant::bench

#ifndef PQ_BENCH_NO_MAIN
int main(int argc, char** argv) {
  using namespace prefixquant;
  using namespace prefixquant::bench;
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode != "time") {
    const bool small = mode == "small";
    return check_all(small, launch_own) + check_all(small, launch_cp_async) != 0;
  }
  for (KvDtype cache : {KvDtype::kInt4, KvDtype::kInt8, KvDtype::kBFloat16}) {
    for (int page : {0, 16, 64}) {
      time_one(cache, std::vector<int>(16, 8192), page, "", launch_own);
      time_one(cache, {32768}, page, "", launch_own);
      time_one(cache, {2048}, page, "", launch_own);
    }
  }
  return 0;
}
#endif
