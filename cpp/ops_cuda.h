// SPDX-License-Identifier: Apache-2.0
// The CUDA operations of the extension. As in ops.h, each checks its arguments and launches;
// outputs and workspaces are allocated by the caller. The device is that of the first tensor, and
// the caller has made it the current one; `stream` is a cudaStream_t.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace prefixquant {

// gemm_w4_cuda.cpp

// The epilogue beyond scale and bias: see cuda/include/prefixquant/gemm_w4.h.
struct GemmEpilogueArguments {
  OptionalTensor residual;      // [M, N_out], dtype y is rounded to
  OptionalTensor output_scale;  // one float32: y becomes int8
  std::string rounding;         // dtype y is rounded to: "float16", "bfloat16", "float32", "int32"
  int64_t output_bits;          // 4 or 8
  bool swiglu;
};

void prepack_cuda(const TensorView& weight, int64_t bits, const TensorView& prepacked,
                  uintptr_t stream);
void unprepack_cuda(const TensorView& prepacked, int64_t bits, const TensorView& weight,
                    uintptr_t stream);

// kernel, block_rows, block_tokens, stages, cluster, grid, split_k, stream_k_tiles, release_stages:
// GemmW4Config.
using GemmConfigList = std::vector<int64_t>;
// `family`: "" for the choice among all kernels, or "mma", "wgmma", "mma_int4", "stream" for that
// family's own.
GemmConfigList gemm_config_cuda(int64_t m, int64_t n, int64_t k, int64_t weight_bits,
                                int64_t activation_bits, int64_t sm_count, int64_t arch,
                                const std::string& family);
std::string gemm_config_text(const GemmConfigList& config);
// The same for the current device, and the bytes of workspace it needs there.
std::pair<GemmConfigList, int64_t> gemm_plan_cuda(int64_t m, int64_t n, int64_t k,
                                                  int64_t weight_bits, int64_t activation_bits,
                                                  int64_t device);
// The id of the graph capture that the stream is part of, 0 outside one.
uint64_t capture_id_cuda(uintptr_t stream);
int64_t gemm_workspace_cuda(int64_t m, int64_t n, int64_t k, int64_t weight_bits,
                            const GemmConfigList& config);

void gemm_cuda(const TensorView& x, const TensorView& weight, int64_t weight_bits,
               const TensorView& weight_scale, const TensorView& input_scale,
               const OptionalTensor& bias, const GemmEpilogueArguments& epilogue,
               const TensorView& y, const OptionalTensor& workspace, const GemmConfigList& config,
               uintptr_t stream);

// kv_attention_cuda.cpp: q and out [B, T, Hq, D]; k, v [pages, Hkv, page_size, D or D / 2]; lengths
// int32 [B] or none (all max_length); mask bool [B or 1, 1, T, max_length] or none (causal). `op`
// is the operation that messages name.

std::pair<int64_t, int64_t> kv_attention_workspace_cuda(int64_t batch, int64_t tokens,
                                                        int64_t heads, int64_t kv_heads,
                                                        int64_t dim, int64_t device);
void kv_attention_cuda(const std::string& op, const TensorView& q, const TensorView& k,
                       const TensorView& v, const OptionalTensor& k_scale,
                       const OptionalTensor& v_scale, const TensorView& prefix_k,
                       const TensorView& prefix_v, const OptionalTensor& lengths,
                       const OptionalTensor& block_table, const OptionalTensor& mask,
                       int64_t max_length, double scaling, const OptionalTensor& output_scale,
                       int64_t output_bits, const TensorView& out, const TensorView& counters,
                       const TensorView& partials, uintptr_t stream);

// rope_kv_append_cuda.cpp

void rope_kv_append_cuda(const TensorView& qkv, const TensorView& cos, const TensorView& sin,
                         const TensorView& positions, const OptionalTensor& q_norm,
                         const OptionalTensor& k_norm, double eps, const OptionalTensor& signs,
                         int64_t rotation_size, const OptionalTensor& k_shift,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         int64_t kv_bits, const TensorView& k_cache, const TensorView& v_cache,
                         const TensorView& slots, int64_t heads, const TensorView& q,
                         uintptr_t stream);
// kv_append; kv_quantize is that at position 0 of a fresh tensor.
void kv_quantize_cuda(const std::string& op, const TensorView& x, const TensorView& scale,
                      int64_t bits, const OptionalTensor& signs, int64_t block_size,
                      const OptionalTensor& shift, const TensorView& cache, int64_t position,
                      uintptr_t stream);
// y [B, H, T, D] of any strides from the first T rows of each sequence; bits 16 copies.
void kv_dequantize_cuda(const TensorView& q, const OptionalTensor& scale, int64_t bits,
                        const OptionalTensor& block_table, const TensorView& y, uintptr_t stream);
// compand_cuda.cpp
void compand_cuda(const TensorView& q, uintptr_t stream);

// rmsnorm_quant_cuda.cpp: as the functions of ops.h without `_cuda`, and the stream.
void quantize_static_cuda(const TensorView& x, const TensorView& scale, int64_t bits,
                          const TensorView& q, uintptr_t stream);
void quantize_dynamic_cuda(const TensorView& x, int64_t bits, double clip, const TensorView& q,
                           const TensorView& scale, uintptr_t stream);
void rmsnorm_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                  const TensorView& y, uintptr_t stream);
void rmsnorm_quantize_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                           const TensorView& scale, int64_t bits, const OptionalTensor& shift,
                           const TensorView& q, uintptr_t stream);
void rmsnorm_quantize_dynamic_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                                   int64_t bits, const TensorView& q, const TensorView& scale,
                                   uintptr_t stream);
void add_rmsnorm_quantize_cuda(const TensorView& residual, const TensorView& x,
                               const OptionalTensor& weight, double eps, const TensorView& scale,
                               int64_t bits, const OptionalTensor& shift, const TensorView& q,
                               uintptr_t stream);

// rmsnorm_hadamard_cuda.cpp
void rmsnorm_hadamard_quantize_cuda(const TensorView& x, const OptionalTensor& weight, double eps,
                                    const OptionalTensor& signs, const TensorView& scale,
                                    int64_t bits, const OptionalTensor& shift, const TensorView& q,
                                    uintptr_t stream);

// hadamard_cuda.cpp
void hadamard_cuda(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
                   const TensorView& y, uintptr_t stream);
void hadamard_quantize_cuda(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
                            const TensorView& scale, int64_t bits, const TensorView& q,
                            uintptr_t stream);
void swiglu_hadamard_quantize_cuda(const TensorView& gate, const TensorView& up,
                                   const OptionalTensor& signs, int64_t block_size,
                                   const TensorView& scale, int64_t bits, const TensorView& q,
                                   uintptr_t stream);
void swiglu_hadamard_quantize_dynamic_cuda(const TensorView& gate, const TensorView& up,
                                           const OptionalTensor& signs, int64_t block_size,
                                           int64_t bits, const TensorView& q,
                                           const TensorView& scale, uintptr_t stream);
// The sign matrix [k, k] that the kernels of k were compiled with, int8 on the CPU.
void hadamard_compiled_signs(int64_t k, const TensorView& signs);

// outlier_scan_cuda.cpp
void outlier_scan_cuda(const TensorView& x, double eta, const TensorView& row_max,
                       const TensorView& median, const TensorView& is_outlier, uintptr_t stream);

}  // namespace prefixquant
