// SPDX-License-Identifier: Apache-2.0
// The operations of the extension. Each checks its arguments and launches; outputs are allocated by
// the caller and passed in. The formula, shapes and dtypes of each are in its .cpp file and in the
// docstring of its Python function (python/prefixquant/ops/).
#pragma once

#include "tensor_view.h"

namespace prefixquant {

// pack_int4.cpp
void pack_int4(const TensorView& q, const TensorView& packed);
void unpack_int4(const TensorView& packed, const TensorView& q);

// gemm_w4.cpp
void prepack_w4(const TensorView& weight_packed, const TensorView& prepacked);
void unprepack_w4(const TensorView& prepacked, const TensorView& weight_packed);
void prepack_w8(const TensorView& weight, const TensorView& prepacked);
void unprepack_w8(const TensorView& prepacked, const TensorView& weight);
void gemm_w4(const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
             const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y);
void gemm_w8(const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
             const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y);

// quantize.cpp
void quantize_static(const TensorView& x, const TensorView& scale, int64_t bits,
                     const TensorView& q);

// compand.cpp
void compand(const TensorView& q);

// quantize_dynamic.cpp
void quantize_dynamic(const TensorView& x, int64_t bits, double clip, const TensorView& q,
                      const TensorView& scale);

// rmsnorm_quant.cpp
void rmsnorm(const TensorView& x, const OptionalTensor& weight, double eps, const TensorView& y);
void rmsnorm_quantize(const TensorView& x, const OptionalTensor& weight, double eps,
                      const TensorView& scale, int64_t bits, const OptionalTensor& shift,
                      const TensorView& q);
void rmsnorm_quantize_dynamic(const TensorView& x, const OptionalTensor& weight, double eps,
                              int64_t bits, const TensorView& q, const TensorView& scale);
void add_rmsnorm_quantize(const TensorView& residual, const TensorView& x,
                          const OptionalTensor& weight, double eps, const TensorView& scale,
                          int64_t bits, const OptionalTensor& shift, const TensorView& q);

// rmsnorm_hadamard.cpp
void rmsnorm_hadamard_quantize(const TensorView& x, const OptionalTensor& weight, double eps,
                               const OptionalTensor& signs, const TensorView& scale, int64_t bits,
                               const OptionalTensor& shift, const TensorView& q);

// hadamard.cpp
void hadamard(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
              const TensorView& y);
void hadamard_quantize(const TensorView& x, const OptionalTensor& signs, int64_t block_size,
                       const TensorView& scale, int64_t bits, const TensorView& q);
void swiglu_hadamard_quantize(const TensorView& gate, const TensorView& up,
                              const OptionalTensor& signs, int64_t block_size,
                              const TensorView& scale, int64_t bits, const TensorView& q);
void swiglu_hadamard_quantize_dynamic(const TensorView& gate, const TensorView& up,
                                      const OptionalTensor& signs, int64_t block_size, int64_t bits,
                                      const TensorView& q, const TensorView& scale);

// outlier_scan.cpp
void outlier_scan(const TensorView& x, double eta, const TensorView& row_max,
                  const TensorView& median, const TensorView& is_outlier);

// kv_quant.cpp
void kv_quantize(const TensorView& x, const TensorView& scale, int64_t bits,
                 const OptionalTensor& signs, int64_t block_size, const OptionalTensor& shift,
                 const TensorView& q);
void kv_append(const TensorView& x, const TensorView& scale, int64_t bits,
               const OptionalTensor& signs, int64_t block_size, const OptionalTensor& shift,
               const TensorView& cache, int64_t position);
void kv_dequantize(const TensorView& q, const TensorView& scale, int64_t bits, const TensorView& y);

// rope_kv_append.cpp
void rope_kv_append(const TensorView& qkv, const TensorView& cos, const TensorView& sin,
                    const TensorView& positions, const OptionalTensor& q_norm,
                    const OptionalTensor& k_norm, double eps, const OptionalTensor& signs,
                    int64_t rotation_size, const OptionalTensor& k_shift,
                    const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t kv_bits,
                    const TensorView& k_cache, const TensorView& v_cache, const TensorView& slots,
                    int64_t heads, const TensorView& q);

// kv_cache_attention.cpp
void kv_decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         const TensorView& prefix_k, const TensorView& prefix_v,
                         const TensorView& lengths, const OptionalTensor& block_table,
                         int64_t kv_bits, int64_t max_length, double scaling,
                         const OptionalTensor& output_scale, int64_t output_bits,
                         const TensorView& out);
void kv_prefill_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                          const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                          const TensorView& prefix_k, const TensorView& prefix_v, int64_t kv_bits,
                          int64_t start, double scaling, int64_t sequence,
                          const OptionalTensor& block_table, const TensorView& out);

// kv_attention.cpp
void kv_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& k_scale, const TensorView& v_scale, const TensorView& prefix_k,
                  const TensorView& prefix_v, const OptionalTensor& mask, double scaling,
                  const TensorView& out);

}  // namespace prefixquant
