// SPDX-License-Identifier: Apache-2.0
// From KvAttentionGpuParams to a launch of one kernel configuration.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "prefixquant/check.h"
#include "prefixquant/kv_attention.cuh"
#include "prefixquant/kv_attention_cluster.cuh"

namespace prefixquant {

// Tokens of a chunk, the unit of scheduling: a multiple of every tile's tokens.
inline constexpr int kKvChunkShift = 6;
// What a CTA loses between two rows, in tokens: measured, see docs/kernels/kv_attention.md.
inline constexpr int kKvSwitchTokens = 512;
// Bytes of K and V that a CTA asks L2 for before the kernels ahead have finished.
inline constexpr int kKvPrefetchBytes = 48 << 10;

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

// A launch that may begin while the kernels ahead end (sm_90).
struct KvLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2] = {};

  KvLaunch(dim3 grid, int threads, int smem, bool overlap, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = attributes;
    if (!overlap) return;  // older ones do not know it
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  KvLaunch(const KvLaunch&) = delete;
  void set_cluster(int ctas) {
    if (ctas == 1) return;
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    ++config.numAttrs;
  }
};

// What the ways to share the work cost besides reading, in bytes of K and V that a CTA reads in
// that time (35 ns a KB): measured, see docs/kernels/kv_attention.md.
inline constexpr int64_t kKvExchangeBytes = 40 << 10;  // pieces through global memory
inline constexpr int64_t kKvPlanBytes = 72 << 10;      // the kernel that plans, over a cluster
// The same for several sequences, of which perhaps only one is as long as max_length: what the
// other kernel gains where lengths differ, against what it loses where they do not.
inline constexpr int64_t kKvRaggedBytes = 128 << 10;

// How many clusters of 2^shift CTAs are resident at once on the current device; asked for once.
template <typename C>
int resident_clusters(int shift) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][kKvMaxClusterShift + 1] = {};  // + 1; 0: not asked yet
  int device = 0;
  PQ_CUDA_CHECK(cudaGetDevice(&device));
  std::atomic<int>* const cell = device < kDevices ? &known[device][shift] : nullptr;
  if (cell != nullptr && cell->load() > 0) return cell->load() - 1;
  KvLaunch launch(dim3(1 << shift), C::kThreads,
                  kv_attention_cluster_smem_bytes<C>(kKvColumns, shift), true, nullptr);
  launch.set_cluster(1 << shift);
  int clusters = 0;
  PQ_CUDA_CHECK(
      cudaOccupancyMaxActiveClusters(&clusters, kv_attention_cluster_kernel<C>, &launch.config));
  if (cell != nullptr) cell->store(clusters + 1);
  return clusters;
}

// The CTAs that each row gets for itself, and whether they are a cluster; ctas 0: the kernel that
// plans on the device.
struct KvRowCtas {
  int ctas = 0, cluster_shift = 0;
};

template <typename C>
KvRowCtas choose_row_ctas(const KvAttentionGpuParams& p, int sm_count) {
  const int64_t row_heads = static_cast<int64_t>(p.kv_heads) * kv_column_groups(p);
  const int64_t rows = p.batch * row_heads, bytes = int64_t{2} * p.max_length * C::kRowBytes;
  if (rows > sm_count || p.max_length > 1 << 24) return {};
  const int tiles = (p.max_length + C::kTokens - 1) / C::kTokens;
  // A cluster in which a warp has one tile, or the largest there is.
  int shift = 0;
  while (shift < kKvMaxClusterShift && (C::kWarps << shift) < tiles &&
         (rows << (shift + 1)) <= sm_count && resident_clusters<C>(shift + 1) >= rows) {
    ++shift;
  }
  KvRowCtas best{1 << shift, shift};
  int64_t least = bytes >> shift;
  const int split = static_cast<int>(
      std::min<int64_t>({kKvMaxRowCtas, sm_count / rows, (tiles + C::kWarps - 1) / C::kWarps}));
  if (split > 1 && bytes / split + kKvExchangeBytes < least) {
    best = {split, 0};
    least = bytes / split + kKvExchangeBytes;
  }
  const int64_t planned = p.batch == 1 ? rows * bytes / sm_count + kKvPlanBytes
                                       : row_heads * bytes / sm_count + kKvRaggedBytes;
  return least <= planned ? best : KvRowCtas{};
}

template <typename C>
void launch_kv_attention_cluster(const KvAttentionGpuParams& p, KvAttentionArgs& args,
                                 const KvRowCtas& row, cudaStream_t stream) {
  args.cluster_shift = row.cluster_shift;
  args.by_row_ctas = FastDivisor(row.ctas);
  const int smem = kv_attention_cluster_smem_bytes<C>(args.merge_columns, row.cluster_shift);
  const dim3 grid(row.ctas, p.kv_heads * kv_column_groups(p), p.batch);
  KvLaunch launch(grid, C::kThreads, smem, true, stream);
  launch.set_cluster(1 << row.cluster_shift);
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kv_attention_cluster_kernel<C>, args));
}

template <typename Kernel>
void allow_smem(Kernel* kernel, int bytes) {
  PQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <typename C>
void launch_kv_attention_config(const KvAttentionGpuParams& p, const DeviceInfo& device,
                                cudaStream_t stream) {
  KvAttentionArgs args = make_kv_attention_args(p, C::kTokens, C::kTokens * C::kWarps);
  if (device.arch < 90) args.prefetch_bytes = 0;  // nothing ahead to overlap with
  const int64_t chunks = kv_attention_chunks(p);
  PQ_REQUIRE(chunks < (int64_t{1} << 31),
             "kv_attention: " << chunks << " chunks of tokens are more than 2^31 - 1");
  if constexpr (C::kBulk) {
    const auto kernel = kv_attention_cluster_kernel<C>;
    allow_smem(kernel, std::max(kv_attention_cluster_smem_bytes<C>(kKvColumns, 0),
                                kv_attention_cluster_smem_bytes<C>(kKvColumns, 1)));
    const KvRowCtas row = choose_row_ctas<C>(p, device.sm_count);
    if (row.ctas > 0) return launch_kv_attention_cluster<C>(p, args, row, stream);
  }
  const int smem = kv_attention_smem_bytes<C>(args.merge_columns);
  const int grid = static_cast<int>(std::min<int64_t>(chunks, device.sm_count));
  const auto kernel = kv_attention_kernel<C>;
  allow_smem(kernel, smem);
  const KvLaunch launch(dim3(grid), C::kThreads, smem, device.arch >= 90, stream);
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, args));
}

}  // namespace prefixquant
