// SPDX-License-Identifier: Apache-2.0
// compand_kernel: a thread takes 16 bytes at a time, grid-stride; the bytes in front of the first
// aligned word and behind the last one go one by one, a thread each.
#include "prefixquant/compand.h"

#include <algorithm>

#include "prefixquant/compand.cuh"
#include "prefixquant/cp_async.cuh"
#include "prefixquant/launch.h"

namespace prefixquant {
namespace {

constexpr int kThreads = 256;
constexpr int kWord = 16;  // bytes

__device__ __forceinline__ void compand_byte(int8_t* q) {
  *q = static_cast<int8_t>(compand4(static_cast<uint8_t>(*q)));
}

// head: bytes in front of the first word, below kWord.
__global__ void __launch_bounds__(kThreads) compand_kernel(int8_t* q, int64_t count, int head) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t words = (count - head) / kWord, tail = head + words * kWord;
  grid_dependency_launch();
  grid_dependency_wait();
  if (thread < head) compand_byte(q + thread);
  if (thread < count - tail) compand_byte(q + tail + thread);
  uint4* word = reinterpret_cast<uint4*>(q + head);
  for (int64_t i = thread; i < words; i += int64_t{gridDim.x} * kThreads) {
    const uint4 v = word[i];
    word[i] = make_uint4(compand4(v.x), compand4(v.y), compand4(v.z), compand4(v.w));
  }
}

}  // namespace

void launch_compand(int8_t* q, int64_t count, cudaStream_t stream) {
  PQ_REQUIRE(count >= 0, "compand: count: expected 0 or more, got " << count);
  if (count == 0) return;
  constexpr int64_t kPerSm = 8;  // CTAs: all that an SM's threads allow
  const CurrentDevice device;
  const int64_t begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(q) % kWord);
  const int head = static_cast<int>(std::min(count, (kWord - begin) % kWord));
  const int64_t ctas = (count / kWord + kThreads - 1) / kThreads;
  LaunchShape shape;
  shape.grid = std::clamp<int64_t>(ctas, 1, kPerSm * device.sm_count);
  shape.block = kThreads;
  launch_dependent(compand_kernel, shape, device.arch, stream, q, count, head);
}

}  // namespace prefixquant
