// SPDX-License-Identifier: Apache-2.0
//
// What the CTAs of a cluster need to exchange columns through distributed shared memory.
#pragma once

#include <cstdint>

namespace prefixquant {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The address in CTA `rank` of what lies at the shared-memory address `local` here.
__device__ __forceinline__ uint32_t address_in_rank(uint32_t local, uint32_t rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
#endif
  return remote;
}

// Sends 16 bytes to an address of another CTA, which count on that CTA's mbarrier. Needs no fence
// on either side, and not the memory barrier of the whole GPU that a releasing cluster barrier
// does.
__device__ __forceinline__ void send_to_cluster(uint32_t address, const float4& v,
                                                uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
#endif
}

// The same for four bytes.
__device__ __forceinline__ void send_word_to_cluster(uint32_t address, uint32_t v,
                                                     uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
      "r"(v), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ void store_to_cluster(uint32_t address, uint32_t v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
#endif
}

}  // namespace prefixquant
