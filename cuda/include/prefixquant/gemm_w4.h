// SPDX-License-Identifier: Apache-2.0
//
// Low-bit linear layer on the GPU: host interface of every GEMM and GEMV kernel of the family.
//
// Computes, for x int8 [M, K] and w int4 or int8 [N, K] (prepacked, see layout_w4.h):
//   acc[m, n] = sum_k x[m, k] * w[n, k]                           exactly, in int32
//   y = float(acc) * (input_scale * weight_scale[n])  (+ bias[n])  each float32 operation rounded
//   y = round_to(out_dtype, y)
// and then, in this order and only where asked for, each on the values rounded so far, so that the
// fused result is bit-identical to the composition of the separate steps (silu within 4 ulp of
// float32 before it is rounded):
//   swiglu:    y[m, i] = round(silu(y[m, 2 i]) * y[m, 2 i + 1])    gate and up rows interleaved
//   residual:  y = round(y + residual[m, i])
//   quantize:  q = clamp(rint(y * (1 / output_scale)), output_qmin, output_qmax)      int8
//   container
// A4 and A8 activations are both int8 containers, so W4A4 and W4A8 are the same kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <iosfwd>

namespace prefixquant {

enum class GemmDtype : int { kFloat16, kBFloat16, kFloat32, kInt32 };

// Arguments of one launch. Device pointers unless said otherwise; strides in elements.
struct GemmW4Params {
  const int8_t* x = nullptr;            // [M, K], row-major, values of the int8 container
  int64_t x_row_stride = 0;             // >= K
  const void* weight = nullptr;         // prepacked [N, K], prepacked_bytes(n, k, weight_bits)
  int weight_bits = 4;                  // 4 or 8
  const float* weight_scale = nullptr;  // [N]
  const float* input_scale = nullptr;   // [] (one float in device memory)
  const void* bias = nullptr;           // [N] in bias_dtype, may be nullptr
  GemmDtype bias_dtype = GemmDtype::kFloat32;  // float32, float16 or bfloat16

  void* out = nullptr;                        // [M, N_out]; int8 where output_scale is given
  int64_t out_row_stride = 0;                 // >= N_out; N_out = N / 2 with swiglu, else N
  GemmDtype out_dtype = GemmDtype::kFloat16;  // dtype y is rounded to; int32 returns acc itself

  // Epilogue. All of it needs a 16-bit out_dtype, and none of it goes with int32.
  bool swiglu = false;                  // rows 2 i = gate i, 2 i + 1 = up i; N even
  const void* residual = nullptr;       // [M, N_out] in out_dtype, may be nullptr (may equal out)
  int64_t residual_row_stride = 0;      // >= N_out
  const float* output_scale = nullptr;  // [] (device), may be nullptr; quantizes y to int8
  int output_qmin = -128;
  int output_qmax = 127;

  int m = 0;  // tokens, 0 is allowed
  int n = 0;  // output channels
  int k = 0;

  // gemm_w4_workspace_bytes(config) bytes, 16-byte aligned, whose first kGemmW4CounterBytes are
  // counters: zero before first use, and left at zero by every launch of every kernel, so that all
  // layers can share one buffer. Launches sharing it must be ordered (one stream).
  void* workspace = nullptr;

  // True lets the launch overlap the end of the kernel before it in the stream (programmatic
  // dependent launch): weights are prefetched before that kernel has finished, so it must not be
  // the one that writes them. Everything else is read after it.
  bool weight_is_constant = false;
};

// Every kernel keeps its arrival counters in the first bytes of the workspace and partial sums
// behind them: a counter never lies where another config leaves sums.
inline constexpr size_t kGemmW4CounterBytes = 16384;

// The kernel families. All of them read the prepacked layout of layout_w4.h.
enum class GemmW4Kernel : int {
  kGemv,         // mma.m16n8k32 s8, weights as A operand, M = 1 .. 8   gemm_w4_mma.cuh
  kMmaSkinny,    // the same, M = 9 .. 64                               gemm_w4_mma.cuh
  kMmaTiled,     // the same, any M, any arch >= sm_80                  gemm_w4_mma.cuh
  kWgmmaSm90,    // wgmma m64nNk32 s8, sm_90a                           gemm_w4_sm90.cuh
  kMmaInt4Sm80,  // mma.m16n8k64 s4 (sm_80, sm_86, sm_89; W4A4 only)   gemm_w4_mma.cuh
  kGemvStream    // as kGemv, weights through a ring in shared memory  gemm_w4_stream.cuh
};

struct GemmW4Shape {
  int m = 0;
  int n = 0;
  int k = 0;
  int weight_bits = 4;
  int activation_bits = 8;  // 4 promises values in [-8, 7] (still in int8 containers)
};

// A launch configuration: plain data, chosen by a pure function, printable.
struct GemmW4Config {
  GemmW4Kernel kernel = GemmW4Kernel::kWgmmaSm90;
  int block_rows = 128;    // output channels of one CTA tile
  int block_tokens = 256;  // tokens of one CTA tile
  int stages = 4;   // pipeline depth (0: the kernel has one fixed depth); kGemvStream: slots of the
                    // ring, of 128 k each, at least two
  int cluster = 1;  // CTAs of a cluster; they share the activation tile
  int grid = 0;     // CTAs launched; persistent kernels walk the tiles with these
  int split_k = 1;  // CTAs (clusters) sharing a tile along K, for kernels with a fixed split
  int stream_k_tiles = 0;  // kWgmmaSm90: cluster tiles cut evenly over all clusters along K
  int release_stages = 0;  // kGemvStream: stages left when the next launch may start; 0: at once
};

bool operator==(const GemmW4Config& a, const GemmW4Config& b);
std::ostream& operator<<(std::ostream& os, const GemmW4Config& config);
const char* gemm_w4_kernel_name(GemmW4Kernel kernel);

// Pure function of its arguments; `arch` is 10 * major + minor of the device (90 for H100).
GemmW4Config choose_gemm_w4_config(const GemmW4Shape& shape, int sm_count, int arch);

// Bytes of GemmW4Params::workspace that `config` needs for `shape` (0: none).
size_t gemm_w4_workspace_bytes(const GemmW4Shape& shape, const GemmW4Config& config);

// Asynchronous on `stream`, no allocation, no synchronisation: usable in a CUDA graph.
// Throws std::invalid_argument for impossible arguments, std::runtime_error for CUDA errors.
void launch_gemm_w4(const GemmW4Params& params, const GemmW4Config& config, cudaStream_t stream);

// One entry point a family, each defined beside its kernels; launch_gemm_w4 dispatches to them.
// The workspace functions answer for the family's own configs.
void launch_gemm_w4_sm90(const GemmW4Params& params, const GemmW4Config& config,
                         cudaStream_t stream);
size_t gemm_w4_sm90_workspace_bytes(const GemmW4Shape& shape, const GemmW4Config& config);
GemmW4Config choose_gemm_w4_sm90_config(const GemmW4Shape& shape, int sm_count);

// kGemv, kMmaSkinny and kMmaTiled.
void launch_gemm_w4_mma(const GemmW4Params& params, const GemmW4Config& config,
                        cudaStream_t stream);
size_t gemm_w4_mma_workspace_bytes(const GemmW4Shape& shape, const GemmW4Config& config);
GemmW4Config choose_gemm_w4_mma_config(const GemmW4Shape& shape, int sm_count, int arch);

// kGemvStream, from sm_90 on, m <= kGemvStreamTokens. The chosen `stages` is 0 where another kernel
// is the better choice, or the activations leave no room for a ring.
inline constexpr int kGemvStreamTokens = 8;
void launch_gemm_w4_stream(const GemmW4Params& params, const GemmW4Config& config,
                           cudaStream_t stream);
GemmW4Config choose_gemm_w4_stream_config(const GemmW4Shape& shape, int sm_count);

// kMmaInt4Sm80.
void launch_gemm_w4_sm80(const GemmW4Params& params, const GemmW4Config& config,
                         cudaStream_t stream);
size_t gemm_w4_sm80_workspace_bytes(const GemmW4Shape& shape, const GemmW4Config& config);
GemmW4Config choose_gemm_w4_sm80_config(const GemmW4Shape& shape, int sm_count);

}  // namespace prefixquant
