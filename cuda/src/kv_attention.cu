// SPDX-License-Identifier: Apache-2.0
// Checks, workspace and dispatch of the KV attention kernels.
#include <algorithm>

#include "prefixquant/kv_attention_config.cuh"

namespace prefixquant {

bool kv_attention_supports_dim(int dim) {
  return dim == 64 || dim == 96 || dim == 128 || dim == 256;
}

KvAttentionWorkspace kv_attention_workspace(const KvAttentionGpuParams& p, int sm_count) {
  const size_t rows = static_cast<size_t>(p.batch) * p.kv_heads * kv_column_groups(p);
  const size_t slots = 2 * static_cast<size_t>(sm_count);  // two of a CTA
  // A counter a row; or, where each row has its own CTAs, the marked words of their units.
  size_t counters = rows * sizeof(int);
  if (rows > 0 && rows <= static_cast<size_t>(sm_count)) {
    const size_t ctas = std::min<size_t>(kKvMaxRowCtas, sm_count / rows);
    const size_t units = std::min(kKvColumns, p.tokens * p.group) * kv_spans(p.dim);
    counters = std::max(counters, rows * ctas * units * kKvMarkedPairs * sizeof(KvMarkedPair));
  }
  return {counters, slots * kv_partial_floats(p.dim) * sizeof(float)};
}

void launch_kv_attention(const KvAttentionGpuParams& p, const DeviceInfo& device,
                         cudaStream_t stream) {
  if (p.batch == 0 || p.tokens == 0 || p.kv_heads == 0) return;
  PQ_REQUIRE(p.q_dtype == KvDtype::kFloat16 || p.q_dtype == KvDtype::kBFloat16,
             "kv_attention: q: expected float16 or bfloat16");
  PQ_REQUIRE(
      p.prefix == 0 || p.prefix_dtype == KvDtype::kFloat16 || p.prefix_dtype == KvDtype::kBFloat16,
      "kv_attention: prefix_k: expected float16 or bfloat16");
  PQ_REQUIRE(p.max_length >= 0 && p.page_size > 0 &&
                 (p.block_table != nullptr || p.max_length <= p.page_size),
             "kv_attention: max_length: expected at most the "
                 << p.page_size << " rows of the cache, got " << p.max_length);
  switch (p.cache_dtype) {
    case KvDtype::kInt4:
      return launch_kv_attention_format<KvFormat::kInt4>(p, device, stream);
    case KvDtype::kInt8:
      return launch_kv_attention_format<KvFormat::kInt8>(p, device, stream);
    default:
      PQ_REQUIRE(p.cache_dtype == p.q_dtype,
                 "kv_attention: q: expected the dtype of a 16-bit cache");
      if (p.q_dtype == KvDtype::kFloat16) {
        return launch_kv_attention_format<KvFormat::kFloat16>(p, device, stream);
      }
      return launch_kv_attention_format<KvFormat::kBFloat16>(p, device, stream);
  }
}

}  // namespace prefixquant
