// SPDX-License-Identifier: Apache-2.0
//
// Sums of 24-bit integers with signs on the tensor cores, exact:
//   S[i, c] = sum over j of sign[i, j] X[j, c]        int32
// X + 2^22 is cut into three planes of unsigned bytes. The product of the signs (s8) with the high
// plane, shifted left by 8, goes on with the middle plane, and so with the low one; it starts at
// -2^6 times the sum of the signs of its row, which becomes the 2^22 that every input has too much.
//
// Fragments of m16n8k32 as in mma.cuh, lane = 4 g + t; signs beyond [k, k] are 0, so that what the
// planes hold for inputs beyond k does not matter.
#pragma once

#include <cstdint>

#include "prefixquant/hadamard_integer.cuh"

namespace prefixquant {

// c += A B of signed and unsigned bytes, exact in int32.
__device__ __forceinline__ void mma_m16n8k32_s8_u8(int32_t (&c)[4], const uint4& a, uint32_t b0,
                                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The same with the planes as A.
__device__ __forceinline__ void mma_m16n8k32_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// This lane's part of the signs of outputs 16 tile .. + 15 and inputs 32 step .. + 31. Not __ldg:
// ptxas moves such loads behind a wait for the kernel before, which they are there to overlap.
__device__ __forceinline__ uint4 sign_fragment(const int8_t* signs, int k, int tile, int step,
                                               int lane) {
  const int row = 16 * tile + lane / 4, column = 32 * step + lane % 4 * 4;
  const auto word = [&](int i, int j) {
    uint32_t four = 0;
    if (i < k && j < k) {
      asm volatile("ld.global.b32 %0, [%1];" : "=r"(four) : "l"(signs + i * k + j));
    }
    return four;
  };
  return make_uint4(word(row, column), word(row + 8, column), word(row, column + 16),
                    word(row + 8, column + 16));
}

// The sum of four signed bytes.
__device__ __forceinline__ int32_t sum_of_bytes(uint32_t word, int32_t sum) {
  return __dp4a(static_cast<int32_t>(word), 0x01010101, sum);
}
__device__ __forceinline__ int32_t sum_of_four_lanes(int32_t v) {
  v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

// Four inputs of a column -> its word in the high, middle and low plane.
__device__ __forceinline__ void split_in_planes(const uint32_t (&x)[4], uint32_t& high,
                                                uint32_t& middle, uint32_t& low) {
  const uint32_t p = __byte_perm(x[0], x[1], 0x5140), q = __byte_perm(x[2], x[3], 0x5140);
  low = __byte_perm(p, q, 0x5410);
  middle = __byte_perm(p, q, 0x7632);
  high = __byte_perm(__byte_perm(x[0], x[1], 0x0062), __byte_perm(x[2], x[3], 0x0062), 0x5410);
}

}  // namespace prefixquant
