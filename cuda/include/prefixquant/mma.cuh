// SPDX-License-Identifier: Apache-2.0
// Warp-level tensor-core bricks: mma.sync on integer fragments and ldmatrix.
//
// Fragment ownership of one warp, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k32"):
//   A 16x32 s8: a0 = (row g, k 4t..4t+3)   a1 = (row g+8, same k)   a2, a3 = a0, a1 at k + 16
//   B 32x8  s8: b0 = (k 4t..4t+3, col g)   b1 = b0 at k + 16
//   C 16x8 s32: c0, c1 = (row g, cols 2t, 2t+1)   c2, c3 = (row g+8, same cols)
// mma.m16n8k64 on s4 has the same picture with eight nibbles, not four bytes, in a register.
#pragma once

#include <cstdint>

namespace prefixquant {

// c += A B, exact in int32 (wraps modulo 2^32). One instruction on every arch >= sm_80. Not
// volatile: the compiler may move it among loads.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&c)[4], uint32_t a0, uint32_t a1,
                                                uint32_t a2, uint32_t a3, uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// One instruction on sm_80/86/89; emulated (about 200 instructions) on sm_90 and later.
__device__ __forceinline__ void mma_m16n8k64_s4(int32_t (&c)[4], uint32_t a0, uint32_t a1,
                                                uint32_t a2, uint32_t a3, uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8x16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and receives
// bytes 4t..4t+3 of row g of each. On a K-major operand of bytes that is: d[i] = (row g, k 16i+4t).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t smem_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(smem_address)
               : "memory");
}

// Two of them, by the addresses of lanes 0 .. 15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t smem_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(smem_address)
               : "memory");
}

}  // namespace prefixquant
