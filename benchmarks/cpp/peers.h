// SPDX-License-Identifier: Apache-2.0
//
// What our GEMM is measured against, behind one interface: out[M, N] = x[M, K] * w[N, K]^T.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>

namespace prefixquant::bench {

// Launches one product on a stream; pointers are device memory, row-major, no padding.
using PeerLaunch = std::function<void(const void* x, const void* w, void* out, int m, int n, int k,
                                      cudaStream_t stream)>;

// cuBLASLt, found at run time (dlopen), so that building needs neither its header nor its library.
// An empty function where it is not there.
PeerLaunch make_cublaslt_fp16();  // x, w float16 -> out float16

// CUTLASS's own Hopper GEMM (collective builder) on unpacked int8: x, w int8 -> out float16.
PeerLaunch make_cutlass_int8_128x256();  // 128x256x128, cluster 2x1x1, cooperative
PeerLaunch make_cutlass_int8_128x128();  // 128x128x128, cluster 1x1x1, pingpong

}  // namespace prefixquant::bench
