// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/kv_attention_config.cuh"

namespace prefixquant {
template void launch_kv_attention_format<KvFormat::kFloat16>(const KvAttentionGpuParams&,
                                                             const DeviceInfo&, cudaStream_t);
}  // namespace prefixquant
