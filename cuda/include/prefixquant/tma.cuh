// SPDX-License-Identifier: Apache-2.0
//
// The bulk copy engine of sm_90: PTX wrappers of tensor (TMA) and plain bulk copies from global to
// shared memory, completing on an mbarrier.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace prefixquant {

// L2 eviction policies as the 64-bit constants `createpolicy.fractional` yields for a fraction
// of 1.
inline constexpr uint64_t kL2EvictNormal = 0x1000000000000000ull;
inline constexpr uint64_t kL2EvictFirst = 0x12F0000000000000ull;
inline constexpr uint64_t kL2EvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at (column, row) to `smem`; what lies outside the tensor arrives as zeros
// and counts as delivered bytes all the same.
__device__ __forceinline__ void tma_load_2d(uint32_t smem, const CUtensorMap* map, int column,
                                            int row, uint32_t barrier, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(l2_policy)
      : "memory");
}

// The same box to the same address in every CTA of `cta_mask`, completing on each one's barrier.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t smem, const CUtensorMap* map,
                                                      int column, int row, uint32_t barrier,
                                                      uint16_t cta_mask, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(smem),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(cta_mask), "l"(l2_policy)
      : "memory");
}

// `bytes` contiguous bytes; both addresses and the size are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* source, uint32_t bytes,
                                          uint32_t barrier, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(source), "r"(bytes), "r"(barrier), "l"(l2_policy)
      : "memory");
}

// The same from this CTA's shared memory to that of a CTA of the cluster, with its barrier there.
__device__ __forceinline__ void bulk_copy_to_cluster(uint32_t to, uint32_t from, uint32_t bytes,
                                                     uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace prefixquant
