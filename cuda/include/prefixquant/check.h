// SPDX-License-Identifier: Apache-2.0
//
// Error bridge of the launchers: CUDA failures become std::runtime_error with file and line, wrong
// arguments std::invalid_argument.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace prefixquant {

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const char* expression,
                                          const char* file, int line) {
  std::ostringstream message;
  message << file << ":" << line << ": " << expression << ": " << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

}  // namespace prefixquant

#define PQ_CUDA_CHECK(expression)                                                 \
  do {                                                                            \
    const cudaError_t pq_error = (expression);                                    \
    if (pq_error != cudaSuccess)                                                  \
      ::prefixquant::throw_cuda_error(pq_error, #expression, __FILE__, __LINE__); \
  } while (0)

// `text` is a stream expression: PQ_REQUIRE(k > 0, "gemm_w4: k must be positive, got " << k).
#define PQ_REQUIRE(condition, text)                  \
  do {                                               \
    if (!(condition)) {                              \
      std::ostringstream pq_message;                 \
      pq_message << text;                            \
      throw std::invalid_argument(pq_message.str()); \
    }                                                \
  } while (0)
