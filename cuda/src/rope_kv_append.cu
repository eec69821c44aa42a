// SPDX-License-Identifier: Apache-2.0
// q/k norm, RoPE, R3, shift, quantize and append in one pass over qkv; see rope_kv_append.h.
// Grid: a warp takes kHeadsPerWarp consecutive heads of one token (one head where there are few
// tokens), in the order q, k, v; the table rows of the token are read once a warp.
// Smem: SharedRow only, 2 D floats a warp.
#include "prefixquant/rope_kv_append.h"

#include <cmath>

#include "prefixquant/check.h"
#include "prefixquant/cp_async.cuh"
#include "prefixquant/head_row.cuh"

namespace prefixquant {
namespace {

constexpr int kWarps = 4;
constexpr int kBatch = 4;         // heads whose loads are in flight together
constexpr int kHeadsPerWarp = 8;  // where there are tokens enough to fill the chip
constexpr int kWarpsToFill = 32;  // warps of an SM below which a warp takes one head only
constexpr int kMaxDim = 1024;

struct RopeKvAppendArgs {
  RopeKvAppendParams p;
  HeadRotation rotation;
  int heads_per_warp;
  int units;     // of a token
  bool overlap;  // with the kernel ahead: sm_90 and later
};

template <typename T, typename Row>
__device__ __forceinline__ void transform_and_store(Row& row, const RopeKvAppendArgs& a, int token,
                                                    int head, int64_t slot) {
  const RopeKvAppendParams& p = a.p;
  const bool is_q = head < p.heads, is_k = !is_q && head < p.heads + p.kv_heads;
  if (is_q || is_k) {
    const HeadNorm norm{is_q ? p.q_norm : p.k_norm, p.norm_dtype, p.eps};
    if (norm.weight != nullptr) row.normalize(norm);
    row.rope();
    if (a.rotation.size > 1) row.rotate(a.rotation);
    if (is_k && p.k_shift != nullptr) {
      row.subtract(p.k_shift + static_cast<int64_t>(head - p.heads) * p.dim);
    }
  }
  if (is_q) {
    row.store(static_cast<T*>(p.q) + (static_cast<int64_t>(token) * p.heads + head) * p.dim);
    return;
  }
  if (slot < 0) return;
  const int kv_head = head - p.heads - (is_k ? 0 : p.kv_heads);
  const int64_t* strides = is_k ? p.k_strides : p.v_strides;
  const int64_t at =
      slot / p.page_size * strides[0] + kv_head * strides[1] + slot % p.page_size * strides[2];
  store_cached(row, p.cache_dtype, static_cast<uint8_t*>(is_k ? p.k_cache : p.v_cache) + at,
               (is_k ? p.k_scale : p.v_scale) + kv_head);
}

template <typename T, typename Row>
__global__ void __launch_bounds__(32 * kWarps)
    rope_kv_append_kernel(const __grid_constant__ RopeKvAppendArgs a) {
  extern __shared__ float smem[];
  const RopeKvAppendParams& p = a.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int token = static_cast<int>(unit / a.units);
  grid_dependency_launch();
  if (token >= p.tokens) return;
  const int all_heads = p.heads + 2 * p.kv_heads;
  const int begin = static_cast<int>(unit % a.units) * a.heads_per_warp;
  const int end = min(all_heads, begin + a.heads_per_warp);
  Row row(smem + warp * 2 * p.dim, p.dim, lane);
  grid_dependency_wait();
  const T* const heads = static_cast<const T*>(p.qkv) + token * p.qkv_stride;
  const int64_t slot = p.slots[token];
  if (begin < p.heads + p.kv_heads) {
    const int64_t position = p.positions[token];
    row.load_table(p.cos + position * p.dim, p.sin + position * p.dim);
  }
  for (int first = begin; first < end; first += kBatch) {
    typename Row::template Loaded<T> loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < end) loaded[i] = row.fetch(heads + static_cast<int64_t>(first + i) * p.dim);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= end) break;
      row.take(loaded[i], heads + static_cast<int64_t>(first + i) * p.dim);
      transform_and_store<T>(row, a, token, first + i, slot);
    }
  }
}

template <typename T, typename Row>
void launch_rows(const RopeKvAppendArgs& args, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(args.p.tokens) * args.units;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((units + kWarps - 1) / kWarps));
  config.blockDim = dim3(32 * kWarps);
  config.dynamicSmemBytes = Row::kShared ? kWarps * 2 * args.p.dim * sizeof(float) : 0;
  config.stream = stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = args.overlap ? 1 : 0;
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&config, rope_kv_append_kernel<T, Row>, args));
}

int64_t bytes_of(KvDtype dtype) {
  return dtype == KvDtype::kFloat32 ? 4 : dtype == KvDtype::kInt8 ? 1 : 2;
}

// Whether the vector accesses of RegisterRow hit aligned addresses in every row.
bool rows_are_aligned(const RopeKvAppendParams& p) {
  if (p.dim % 64 != 0) return false;
  const int64_t lane_channels = p.dim / 32;
  const int64_t cache_lane =
      p.cache_dtype == KvDtype::kInt4 ? lane_channels / 2 : lane_channels * bytes_of(p.cache_dtype);
  const int64_t lane_bytes = std::min<int64_t>(16, lane_channels * bytes_of(p.dtype));
  uint64_t offsets =
      reinterpret_cast<uintptr_t>(p.k_cache) | reinterpret_cast<uintptr_t>(p.v_cache);
  for (int i = 0; i < 3; ++i) offsets |= p.k_strides[i] | p.v_strides[i];
  const uint64_t q_offsets = reinterpret_cast<uintptr_t>(p.qkv) |
                             static_cast<uint64_t>(p.qkv_stride * bytes_of(p.dtype)) |
                             reinterpret_cast<uintptr_t>(p.q);
  const uint64_t tables = reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin) |
                          reinterpret_cast<uintptr_t>(p.k_shift);
  return offsets % std::min<int64_t>(16, cache_lane) == 0 && q_offsets % lane_bytes == 0 &&
         tables % 16 == 0;
}

template <typename T>
void launch_dtype(const RopeKvAppendArgs& args, cudaStream_t stream) {
  const bool in_registers = rows_are_aligned(args.p) && args.rotation.k == 1;
  if (in_registers && args.p.dim == 64) return launch_rows<T, RegisterRow<64>>(args, stream);
  if (in_registers && args.p.dim == 128) return launch_rows<T, RegisterRow<128>>(args, stream);
  if (in_registers && args.p.dim == 256) return launch_rows<T, RegisterRow<256>>(args, stream);
  launch_rows<T, SharedRow>(args, stream);
}

}  // namespace

void launch_rope_kv_append(const RopeKvAppendParams& p, const DeviceInfo& device,
                           cudaStream_t stream) {
  if (p.tokens == 0) return;
  PQ_REQUIRE(p.dim > 0 && p.dim % 2 == 0 && p.dim <= kMaxDim,
             "rope_kv_append: k_cache: expected an even head dimension of at most "
                 << kMaxDim << ", got " << p.dim);
  RopeKvAppendArgs args{};
  args.p = p;
  args.rotation = {p.signs, p.sign_size, p.rotation_size,
                   static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.rotation_size)))};
  args.overlap = device.arch >= 90;
  const int all_heads = p.heads + 2 * p.kv_heads;
  const bool few = static_cast<int64_t>(p.tokens) * all_heads <=
                   static_cast<int64_t>(device.sm_count) * kWarpsToFill;
  args.heads_per_warp = few ? 1 : kHeadsPerWarp;
  args.units = (all_heads + args.heads_per_warp - 1) / args.heads_per_warp;
  PQ_REQUIRE(static_cast<int64_t>(p.tokens) * args.units / kWarps < (int64_t{1} << 31) - 1,
             "rope_kv_append: qkv: " << p.tokens << " tokens are too many for one launch");
  if (p.dtype == KvDtype::kFloat16) return launch_dtype<__half>(args, stream);
  if (p.dtype == KvDtype::kBFloat16) return launch_dtype<__nv_bfloat16>(args, stream);
  PQ_REQUIRE(p.dtype == KvDtype::kFloat32, "rope_kv_append: qkv: expected a floating dtype");
  launch_dtype<float>(args, stream);
}

}  // namespace prefixquant
