// SPDX-License-Identifier: Apache-2.0
//
// The companding of quantized activations on the GPU: host interface.
//
// Computes, in place, for every int8 q: the nearest of +-5, 14, 25, 38, 53, 72, 95, 126; 0 becomes
// 5. They are the sixteen levels of companded 4-bit activations, in units of an 8-bit scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace prefixquant {

// Asynchronous on `stream`, no allocation, no synchronisation. q of any alignment.
void launch_compand(int8_t* q, int64_t count, cudaStream_t stream);

}  // namespace prefixquant
