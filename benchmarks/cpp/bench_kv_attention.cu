// SPDX-License-Identifier: Apache-2.0
//
// The KV attention kernels without Python.
//   bench_kv_attention check   every format, head dimension and cache shape against float64;
//                              unused slots are NaN or -1, unused page numbers absurd
//   bench_kv_attention small   the same on short sequences, made for compute-sanitizer
//   bench_kv_attention few     fewer of them, for its slower tools
//   bench_kv_attention time    microseconds and GB/s of KV4, KV8 and KV16; caches out of L2; also
//                              with the instructions out of the SM's caches ("cold")
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

// Lets the kernel behind it begin, and writes the lengths long after: one that is launched to
// overlap has then planned, or copied rows, for other lengths.
__global__ void write_lengths_late(int* to, const int* from, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < 40; ++i) __nanosleep(1000);
#endif
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

bool check(const KvProblem& problem, Launch launch) {
  const KvOperands operands(problem, sm_count());
  const int count = static_cast<int>(problem.lengths.size());
  const std::vector<int> early(problem.early_lengths.empty() ? problem.lengths
                                                             : problem.early_lengths);
  int* const final_lengths = to_device(problem.lengths);
  KvError error;
  std::vector<uint8_t> first, again(operands.out_count * operands.out_bytes);
  for (int run = 0; run < 3; ++run) {  // counters must be back at zero, results the same bits
    PQ_CUDA_CHECK(cudaMemset(operands.params[0].out, 0xFF, again.size()));
    if (!problem.early_lengths.empty()) {
      PQ_CUDA_CHECK(
          cudaMemcpy(operands.lengths, early.data(), count * sizeof(int), cudaMemcpyHostToDevice));
      write_lengths_late<<<1, 32>>>(operands.lengths, final_lengths, count);
    }
    launch(operands.params[0], sm_count(), nullptr);
    PQ_CUDA_CHECK(
        cudaMemcpy(again.data(), operands.params[0].out, again.size(), cudaMemcpyDeviceToHost));
    if (run == 0) {
      error = check_output(operands, 0);
      first = again;
    }
  }
  PQ_CUDA_CHECK(cudaFree(final_lengths));
  const bool same = first == again;
  const bool good = error.finite && same && error.ours <= 2 * error.rounded + 1e-6;
  std::printf("%-8s %-44s error %.2e, of bfloat16 %.2e%s\n", good ? "ok" : "WRONG",
              problem.name.c_str(), error.ours, error.rounded, error.finite ? "" : ", NOT FINITE");
  if (!same) std::printf("         ^ NOT REPEATABLE\n");
  return good;
}

enum class Size { kFew, kSmall, kLarge };

int check_all(Size size, Launch launch) {
  const bool small = size != Size::kLarge, few_cases = size == Size::kFew;
  int wrong = 0;
  const std::vector<int> ragged =
      small ? std::vector<int>{1, 0, 17, 200} : std::vector<int>{1, 10000, 0, 17, 128, 129, 4095};
  const auto run = [&](KvProblem problem) {
    problem.name =
        std::string(name_of(problem.cache)) + " D " + std::to_string(problem.dim) + " heads " +
        std::to_string(problem.kv_heads) + "x" + std::to_string(problem.group) + " T " +
        std::to_string(problem.tokens) + " P " + std::to_string(problem.prefix) + " page " +
        std::to_string(problem.page_size) + " B " + std::to_string(problem.lengths.size()) + "x" +
        std::to_string(problem.lengths[0]) + (problem.mask ? " mask" : "") +
        (problem.quantize ? " int8" : "") + (problem.early_lengths.empty() ? "" : " late lengths");
    wrong += !check(problem, launch);
  };
  for (KvDtype cache : {KvDtype::kInt4, KvDtype::kInt8, KvDtype::kFloat16, KvDtype::kBFloat16}) {
    for (int dim : {64, 96, 128, 256}) {
      if (few_cases && dim != (cache == KvDtype::kInt4 ? 128 : 96)) continue;
      KvProblem p;
      p.cache = cache, p.dim = dim, p.kv_heads = 2, p.group = 4, p.lengths = ragged;
      run(p);
      KvProblem few = p;  // rows with CTAs of their own: a cluster each, and through global memory
      few.lengths = {3, 700};
      run(few);
      few.lengths = {small ? 1500 : 9000}, few.kv_heads = 1, few.group = 8, few.prefix = 9;
      run(few);
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
    if (few_cases && group != 7) continue;
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
  // One sequence: the kernel with a cluster a row, from no tile at all to several rounds of them.
  p = KvProblem{};
  for (int length : {0, 1, 33, 513, small ? 700 : 32768}) {
    p.lengths = {length}, p.kv_heads = small ? 2 : 8;
    run(p);
  }
  for (int page : {0, 16}) {
    p.page_size = page, p.kv_heads = 2;
    p.lengths = {700}, p.early_lengths = {90};
    run(p);
    p.lengths = {90}, p.early_lengths = {700};
    run(p);
    p.lengths = {5, 3000}, p.early_lengths = {3000, 0};
    if (!small) run(p);
  }
  std::printf("%d wrong\n", wrong);
  return wrong;
}

struct Times {
  double median, low, high;
};

// 2^14 instructions in a straight line, 256 KB of them: what comes after them finds none of its own
// in the caches of the SM.
__global__ void __launch_bounds__(32) evict_instructions(float* out, float x, float y) {
  float a = threadIdx.x, b = x;
#pragma unroll
  for (int i = 0; i < 8192; ++i) a = a * x + b, b = b * y + a;
  if (a + b == 12345.0f) *out = a;
}

struct Timer {
  cudaStream_t stream;
  cudaEvent_t start, end;
  Timer() {
    PQ_CUDA_CHECK(cudaStreamCreate(&stream));
    PQ_CUDA_CHECK(cudaEventCreate(&start));
    PQ_CUDA_CHECK(cudaEventCreate(&end));
  }
  ~Timer() {
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    cudaStreamDestroy(stream);
  }
  Timer(const Timer&) = delete;

  // Microseconds of a replay of what `record` launches on `stream`.
  template <typename Record>
  Times operator()(Record&& record) const {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    PQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    record();
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
      if (i >= 3) samples.push_back(ms * 1e3);
    }
    PQ_CUDA_CHECK(cudaGraphExecDestroy(executable));
    PQ_CUDA_CHECK(cudaGraphDestroy(graph));
    std::sort(samples.begin(), samples.end());
    return {samples[samples.size() / 2], samples.front(), samples.back()};
  }
};

// One graph of a few rotations through the caches, replayed.
Times time_launches(const KvOperands& operands, Launch launch, int rotations) {
  const Timer timer;
  const Times us = timer([&] {
    for (int i = 0; i < rotations; ++i) {
      for (const KvAttentionGpuParams& p : operands.params) launch(p, sm_count(), timer.stream);
    }
  });
  const double launches = static_cast<double>(rotations) * operands.params.size();
  return {us.median / launches, us.low / launches, us.high / launches};
}

// Like rope_kv_append in a decode step: the small kernel ahead, behind which the next one may begin
// while this one waits for its own turn.
__global__ void small_kernel_ahead(float* out) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (threadIdx.x == 0) out[blockIdx.x] = 1.0f;
}

void launch_small_kernel(float* out, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(48);
  config.blockDim = dim3(128);
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = 1;
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&config, small_kernel_ahead, out));
}

// What a launch adds behind kernels that leave none of its instructions in the SMs.
double time_cold(const KvOperands& operands, Launch launch) {
  constexpr int kLaunches = 24;
  const Timer timer;
  float* const out = device_array<float>(48, 0);
  double us[2];
  for (int with = 0; with < 2; ++with) {
    us[with] = timer([&] {
                 for (int i = 0; i < kLaunches; ++i) {
                   evict_instructions<<<sm_count(), 32, 0, timer.stream>>>(nullptr, 1.5f, 0.5f);
                   launch_small_kernel(out, timer.stream);
                   if (with) {
                     launch(operands.params[i % operands.params.size()], sm_count(), timer.stream);
                   }
                 }
               }).median;
  }
  PQ_CUDA_CHECK(cudaFree(out));
  return (us[1] - us[0]) / kLaunches;
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
  p.lengths = lengths, p.spare_rows = 0;
  int64_t tokens = 0;
  for (int length : lengths) tokens += length;
  p.copies = std::min(512, copies_out_of_l2(2 * tokens * kv_heads * dim * bits_of(cache) / 8));
  const KvOperands operands(p, sm_count());
  const Times us = time_launches(operands, launch, std::max(1, 60 / p.copies));
  std::printf("%-10s %-8s D %d B %zu x %d page %d: %.2f us (%.2f .. %.2f), %.0f GB/s; cold %.2f\n",
              variant, name_of(cache), dim, lengths.size(), lengths[0], page_size, us.median,
              us.low, us.high, operands.read_bytes / us.median * 1e-3, time_cold(operands, launch));
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
    const Size size = mode == "few" ? Size::kFew : mode == "small" ? Size::kSmall : Size::kLarge;
    return check_all(size, launch_own) + check_all(size, launch_cp_async) != 0;
  }
  for (KvDtype cache : {KvDtype::kInt4, KvDtype::kInt8, KvDtype::kBFloat16}) {
    for (int page : {0, 16, 64}) {
      time_one(cache, std::vector<int>(16, 8192), page, "", launch_own);
      time_one(cache, {32768}, page, "", launch_own);
      time_one(cache, {2048}, page, "", launch_own);
      time_one(cache, {513}, page, "", launch_own);
      time_one(cache, std::vector<int>(16, 513), page, "", launch_own);
    }
  }
  return 0;
}
#endif
