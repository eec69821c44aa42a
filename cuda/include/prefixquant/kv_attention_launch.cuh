// SPDX-License-Identifier: Apache-2.0
// From KvAttentionGpuParams to a launch of one kernel configuration.
#pragma once

#include <algorithm>
#include <cmath>

#include "prefixquant/check.h"
#include "prefixquant/kv_attention.cuh"

namespace prefixquant {

// Tokens of a chunk, the unit of scheduling: a multiple of every tile's tokens.
inline constexpr int kKvChunkShift = 6;
// What a CTA loses between two rows, in tokens: measured, see docs/kernels/kv_attention.md.
inline constexpr int kKvSwitchTokens = 512;
// Bytes of K and V that a CTA asks L2 for before the kernels ahead have finished.
inline constexpr int kKvPrefetchBytes = 64 << 10;

inline int kv_column_groups(const KvAttentionGpuParams& p) {
  return (p.tokens * p.group + kKvColumns - 1) / kKvColumns;
}

inline KvAttentionArgs make_kv_attention_args(const KvAttentionGpuParams& p, int tile_tokens,
                                              int round_tokens) {
  KvAttentionArgs a{};
  a.q = p.q;
  std::copy(p.q_strides, p.q_strides + 3, a.q_strides);
  a.q_is_bf16 = p.q_dtype == KvDtype::kBFloat16;
  int run = 1;
  while (run < tile_tokens && p.page_size % (2 * run) == 0) run *= 2;
  if (p.block_table == nullptr) run = tile_tokens;
  a.cache = {p.k,
             p.v,
             p.k_strides[0],
             p.k_strides[1],
             p.v_strides[0],
             p.v_strides[1],
             p.block_table,
             p.block_table_stride,
             FastDivisor(p.page_size),
             p.pages,
             run};
  a.prefetch_bytes = kKvPrefetchBytes;
  const int groups = kv_column_groups(p);
  a.rows = {p.lengths,
            p.max_length,
            p.batch,
            p.kv_heads,
            groups,
            kKvChunkShift,
            std::max(1, round_tokens >> kKvChunkShift),
            kKvSwitchTokens >> kKvChunkShift,
            FastDivisor(groups)};
  a.k_scale = p.k_scale;
  a.v_scale = p.v_scale;
  a.prefix_k = p.prefix_k;
  a.prefix_v = p.prefix_v;
  a.prefix_is_bf16 = p.prefix_dtype == KvDtype::kBFloat16;
  a.prefix = p.prefix;
  a.mask = p.mask;
  std::copy(p.mask_strides, p.mask_strides + 3, a.mask_strides);
  a.tokens = p.tokens;
  a.kv_heads = p.kv_heads;
  a.group = p.group;
  a.by_group = FastDivisor(p.group);
  a.merge_columns = std::min(kKvColumns, p.tokens * p.group);
  a.logit_scale = p.scaling * 1.44269504088896341f;
  a.out = p.out;
  a.output_scale = p.output_scale;
  a.output_qmin = p.output_qmin;
  a.output_qmax = p.output_qmax;
  a.counters = static_cast<int*>(p.counters);
  a.partials = static_cast<float*>(p.partials);
  return a;
}

inline int64_t kv_attention_chunks(const KvAttentionGpuParams& p) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.kv_heads * kv_column_groups(p);
  const int64_t chunk = 1 << kKvChunkShift;
  return rows * std::max<int64_t>(1, (p.max_length + chunk - 1) / chunk);
}

template <typename C>
void launch_kv_attention_config(const KvAttentionGpuParams& p, const DeviceInfo& device,
                                cudaStream_t stream) {
  const KvAttentionArgs args = make_kv_attention_args(p, C::kTokens, C::kTokens * C::kWarps);
  const int smem = kv_attention_smem_bytes<C>(args.merge_columns);
  const int64_t chunks = kv_attention_chunks(p);
  PQ_REQUIRE(chunks < (int64_t{1} << 31),
             "kv_attention: " << chunks << " chunks of tokens are more than 2^31 - 1");
  const int grid = static_cast<int>(std::min<int64_t>(chunks, device.sm_count));
  const auto kernel = kv_attention_kernel<C>;
  PQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = device.arch >= 90 ? 1 : 0;  // older ones do not know it
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace prefixquant
