// SPDX-License-Identifier: Apache-2.0
// Which kernel configuration runs a cache format and head dimension.
#pragma once

#include "prefixquant/kv_attention_launch.cuh"

namespace prefixquant {

// sm_90. One CTA an SM: fewer pieces to put together than with several small ones, and 96 to 128 KB
// of tiles keep the SM's share of the bandwidth in flight. It takes more than half of the registers
// (or of the shared memory): where two CTAs of the next launch could share an SM, they did, while
// another SM was still busy with this one, and the launch took up to 1.15 times longer (H100).
template <KvFormat kFormat, int kDim>
struct KvBulkChoice {
  static constexpr int kRowBytes = kDim * kv_bits(kFormat) / 8;
  static constexpr int kWarps = kRowBytes <= 256 ? 8 : 4;
  static constexpr int kTiles = kRowBytes <= 64 ? 2 : 1;
  static constexpr int kRingStep = kWarps * 2 * 16 * kTiles * kRowBytes;  // bytes of one stage
  static constexpr int kStages = kRingStep > 48 * 1024 ? 2 : 96 * 1024 / kRingStep;
  using Config = KvAttentionConfig<kFormat, kDim, kWarps, kTiles, kStages, true>;
};

// Other architectures: cp.async, and at most the 99 KB of shared memory that sm_86 and sm_89 have.
template <KvFormat kFormat, int kDim>
struct KvCpAsyncChoice {
  static constexpr int kRowBytes = kDim * kv_bits(kFormat) / 8;
  static constexpr int kTiles = kRowBytes <= 64 ? 2 : 1;
  static constexpr int kTileBytes = 2 * 16 * kTiles * kRowBytes;
  static constexpr int kStages = kTileBytes * 4 > 48 * 1024 ? 1 : 48 * 1024 / (4 * kTileBytes);
  using Config = KvAttentionConfig<kFormat, kDim, 4, kTiles, kStages, false>;
};

template <KvFormat kFormat, int kDim>
void launch_kv_attention_dim(const KvAttentionGpuParams& p, const DeviceInfo& device,
                             cudaStream_t stream) {
  if (device.arch >= 90) {
    launch_kv_attention_config<typename KvBulkChoice<kFormat, kDim>::Config>(p, device, stream);
  } else {
    launch_kv_attention_config<typename KvCpAsyncChoice<kFormat, kDim>::Config>(p, device, stream);
  }
}

// One entry point a format, in src/inst/kv_attention_*.cu.
template <KvFormat kFormat>
void launch_kv_attention_format(const KvAttentionGpuParams& p, const DeviceInfo& device,
                                cudaStream_t stream) {
  switch (p.dim) {
    case 64:
      return launch_kv_attention_dim<kFormat, 64>(p, device, stream);
    case 96:
      return launch_kv_attention_dim<kFormat, 96>(p, device, stream);
    case 128:
      return launch_kv_attention_dim<kFormat, 128>(p, device, stream);
    case 256:
      return launch_kv_attention_dim<kFormat, 256>(p, device, stream);
    default:
      PQ_REQUIRE(false,
                 "kv_attention: q: expected a head dimension of 64, 96, 128 or 256, got " << p.dim);
  }
}

extern template void launch_kv_attention_format<KvFormat::kInt4>(const KvAttentionGpuParams&,
                                                                 const DeviceInfo&, cudaStream_t);
extern template void launch_kv_attention_format<KvFormat::kInt8>(const KvAttentionGpuParams&,
                                                                 const DeviceInfo&, cudaStream_t);
extern template void launch_kv_attention_format<KvFormat::kFloat16>(const KvAttentionGpuParams&,
                                                                    const DeviceInfo&,
                                                                    cudaStream_t);
extern template void launch_kv_attention_format<KvFormat::kBFloat16>(const KvAttentionGpuParams&,
                                                                     const DeviceInfo&,
                                                                     cudaStream_t);

}  // namespace prefixquant
