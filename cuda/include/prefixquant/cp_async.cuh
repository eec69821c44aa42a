// SPDX-License-Identifier: Apache-2.0
// Asynchronous and streaming loads, cluster and grid-dependency bricks. Each is one instruction.
#pragma once

#include <cstdint>

namespace prefixquant {

__device__ __forceinline__ uint32_t smem_address_of(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes global -> shared past L1; bytes from `valid_bytes` (0..16) on are zero-filled, unread.
__device__ __forceinline__ void cp_async_16(uint32_t smem_address, const void* gmem,
                                            int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_address), "l"(gmem),
               "r"(valid_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// A 16-byte read-once load: weights pass through, so they must not evict activations from L1.
__device__ __forceinline__ uint4 load_streaming_16(const void* gmem) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(gmem));
  return v;
}

// Programmatic dependent launch: before the wait a kernel may touch only what no earlier kernel in
// the stream writes. Both are no-ops in a kernel launched without the attribute.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait_acquire() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

// The address, in the shared memory window of CTA `rank` of the cluster, of this CTA's address.
__device__ __forceinline__ uint32_t cluster_map_address(uint32_t smem_address, uint32_t rank) {
  uint32_t mapped = smem_address;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(mapped)
               : "r"(smem_address), "r"(rank));
#endif
  return mapped;
}

__device__ __forceinline__ int32_t cluster_load_s32(uint32_t cluster_address) {
  int32_t v = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.s32 %0, [%1];\n" : "=r"(v) : "r"(cluster_address) : "memory");
#endif
  return v;
}

}  // namespace prefixquant
