// SPDX-License-Identifier: Apache-2.0
// Warp-level tensor-core bricks on 16-bit floats: mma.m16n8k16 and the transposition of an 8x8
// matrix between the lanes of a warp.
//
// Fragment ownership of one warp, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A 16x16: a0 = (row g, k 2t, 2t+1)   a1 = (row g+8, same k)   a2, a3 = a0, a1 at k + 8
//   B 16x8:  b0 = (k 2t, 2t+1, col g)   b1 = b0 at k + 8
//   C 16x8 float: c0, c1 = (row g, cols 2t, 2t+1)   c2, c3 = (row g+8, same cols)
#pragma once

#include <cstdint>

namespace prefixquant {

// c += A B with float32 accumulators; the operands are bfloat16 or float16. Not volatile: the
// compiler may move it among loads.
template <bool kIsBf16>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kIsBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Lane (g, t) gives (row g, cols 2t, 2t+1) of an 8x8 matrix of 16-bit values and receives
// (row 2t, col g) and (row 2t+1, col g): two C columns become a B operand.
__device__ __forceinline__ uint32_t transpose_8x8_16bit(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace prefixquant
