// SPDX-License-Identifier: Apache-2.0
// Asynchronous, streaming and ordered loads, cluster and grid-dependency bricks, each of one or two
// instructions.
#pragma once

#include <cstdint>

#include "prefixquant/mbarrier.cuh"  // smem_address

namespace prefixquant {

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

// A 16-byte read-once load where `wanted`, else `v` stays: a predicate, not a branch, so that the
// compiler may schedule across it. Weights pass through, hence no allocation in L1.
__device__ __forceinline__ void load_streaming_16_if(uint4& v, const void* gmem, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %5, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(gmem), "r"(static_cast<int>(wanted)));
}

// A float that no running kernel writes. Volatile, so that the load is not sunk to its use.
__device__ __forceinline__ float load_constant_float(const float* address) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
}

// A float that an earlier kernel may have written: ptxas moves a load_constant_float above a
// grid_dependency_wait.
__device__ __forceinline__ float load_float(const float* address) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Asks for a line of 128 bytes in the L2 cache. A hint.
__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Asks for memory in the L2 cache; `bytes` and the address are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
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

// Cluster barrier in two halves; the relaxed arrival orders nothing but what fence_mbarrier_init
// did.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait_acquire() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

// Prepares a fresh mbarrier for one phase that ends when `bytes` have arrived; all threads call it.
// The warp barrier between the two steps of thread 0 orders nothing that program order does not,
// but compute-sanitizer's racecheck takes the predicated init for one of the whole warp.
__device__ __forceinline__ void prepare_to_receive(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, bytes);
  __syncwarp();
#endif
}

// Sends two words to the same shared-memory address of CTA `rank` of the cluster; their arrival
// counts 8 bytes on that CTA's mbarrier. Needs no fence on either side.
__device__ __forceinline__ void cluster_send_int2(uint32_t smem_address, int2 v, uint32_t barrier,
                                                  uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %4;\n"
      "mapa.shared::cluster.u32 bar, %3, %4;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.s32 [to], {%1, %2}, [bar];\n"
      "}\n" ::"r"(smem_address),
      "r"(v.x), "r"(v.y), "r"(barrier), "r"(rank)
      : "memory");
#endif
}

// Until all that prepare_to_receive announced has arrived.
__device__ __forceinline__ void cluster_wait_received(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  mbarrier_wait(barrier, 0);
#endif
}

}  // namespace prefixquant
