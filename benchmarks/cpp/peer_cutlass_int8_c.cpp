// SPDX-License-Identifier: Apache-2.0
//
// CUTLASS's int8 GEMM behind a C function, so that benchmarks/bench_gemm_w4.py can time it with
// ctypes in the run, the stream and the CUDA graph of the other kernels.
#include <exception>

#include "peers.h"

// tile 0: 128x256x128, cluster 2x1x1; tile 1: 128x128x128. Returns 0, or 1 where the kernel
// refuses.
extern "C" __attribute__((visibility("default"))) int prefixquant_peer_cutlass_int8(
    int tile, const void* x, const void* w, void* out, int m, int n, int k, void* stream) {
  using prefixquant::bench::PeerLaunch;
  static const PeerLaunch large = prefixquant::bench::make_cutlass_int8_128x256();
  static const PeerLaunch small = prefixquant::bench::make_cutlass_int8_128x128();
  try {
    (tile == 0 ? large : small)(x, w, out, m, n, k, static_cast<cudaStream_t>(stream));
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
