// SPDX-License-Identifier: Apache-2.0
//
// What the microbenchmarks of the row-wise kernels share: buffers, graph-replay timing with
// operands rotated out of the L2 cache, and the bandwidth of a device copy.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "prefixquant/check.h"

namespace prefixquant::bench {

// Device memory of exactly the size asked for, so that memcheck sees a byte too many.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    PQ_CUDA_CHECK(
        cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(1, count) * sizeof(T)));
    PQ_CUDA_CHECK(cudaMemset(data_, 0xA5, count * sizeof(T)));
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    PQ_CUDA_CHECK(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  // Fills the buffer with repetitions of `pattern`.
  void repeat(const std::vector<T>& pattern) const {
    size_t filled = std::min(count_, pattern.size());
    PQ_CUDA_CHECK(cudaMemcpy(data_, pattern.data(), filled * sizeof(T), cudaMemcpyHostToDevice));
    while (filled < count_) {
      const size_t more = std::min(filled, count_ - filled);
      PQ_CUDA_CHECK(
          cudaMemcpyAsync(data_ + filled, data_, more * sizeof(T), cudaMemcpyDeviceToDevice));
      filled += more;
    }
  }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> out(count_);
    PQ_CUDA_CHECK(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Median microseconds of one launch(i, stream), i = 0 .. copies - 1 in turn, by graph replay.
inline double time_us(int copies, const std::function<void(int, cudaStream_t)>& launch,
                      double replay_us = 2000.0) {
  cudaStream_t stream;
  PQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaEvent_t start, stop;
  PQ_CUDA_CHECK(cudaEventCreate(&start));
  PQ_CUDA_CHECK(cudaEventCreate(&stop));
  const auto elapsed_us = [&] {
    float ms = 0.0f;
    PQ_CUDA_CHECK(cudaEventSynchronize(stop));
    PQ_CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
    return 1e3 * ms;
  };
  launch(0, stream);
  PQ_CUDA_CHECK(cudaEventRecord(start, stream));
  for (int i = 0; i < 3; ++i) launch(i % copies, stream);
  PQ_CUDA_CHECK(cudaEventRecord(stop, stream));
  const int wanted = static_cast<int>(replay_us / std::max(0.5, elapsed_us() / 3));
  const int launches = std::max(copies, std::min(400, wanted) / copies * copies);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  PQ_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i % copies, stream);
  PQ_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  PQ_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> samples;
  for (int i = 0; i < 8; ++i) {
    PQ_CUDA_CHECK(cudaEventRecord(start, stream));
    PQ_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    PQ_CUDA_CHECK(cudaEventRecord(stop, stream));
    const double us = elapsed_us() / launches;
    if (i > 0) samples.push_back(us);
  }
  std::sort(samples.begin(), samples.end());
  PQ_CUDA_CHECK(cudaGraphExecDestroy(executable));
  PQ_CUDA_CHECK(cudaGraphDestroy(graph));
  PQ_CUDA_CHECK(cudaEventDestroy(start));
  PQ_CUDA_CHECK(cudaEventDestroy(stop));
  PQ_CUDA_CHECK(cudaStreamDestroy(stream));
  return samples[samples.size() / 2];
}

// Copies of an operand whose sum is four times the L2 cache.
inline int copies_out_of_l2(size_t bytes_each) {
  int l2 = 0;
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0));
  return static_cast<int>(std::max<size_t>(
      1, (4 * static_cast<size_t>(l2) + bytes_each - 1) / std::max<size_t>(1, bytes_each)));
}

// Bytes per second, read and written together, of a device copy of 512 MB.
inline double copy_bandwidth() {
  const size_t bytes = size_t{512} << 20;
  const Buffer<uint8_t> from(bytes), to(bytes);
  const double us = time_us(1, [&](int, cudaStream_t stream) {
    PQ_CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream));
  });
  return 2.0 * bytes / us * 1e6;
}

inline std::mt19937& generator() {
  static std::mt19937 engine(12345);
  return engine;
}

// Normal values; every fourth row 1000 times as large where `outliers`.
inline std::vector<float> normal_rows(size_t rows, size_t cols, bool outliers) {
  std::normal_distribution<float> normal;
  std::vector<float> out(rows * cols);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = normal(generator()) * (outliers && i / cols % 4 == 0 ? 1000.0f : 1.0f);
  }
  return out;
}

}  // namespace prefixquant::bench
