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

}  // namespace prefixquant
