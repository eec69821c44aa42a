// SPDX-License-Identifier: Apache-2.0
//
// wgmma (sm_90a): D[64, N] += A[64, 32] * B[32, N] for int8 operands and int32 accumulators, with A
// in registers and B in shared memory (K-major, 128-byte swizzle).
//
// Fragments, for thread 32 * warp + 4 * group + quad of the warpgroup:
//   A: a[j] holds k = 4 * quad + 16 * (j >> 1) .. + 3 of row 16 * warp + group + 8 * (j & 1)
//   D: d[4 j + 2 h + c] = D[16 * warp + group + 8 * h][8 * j + 2 * quad + c]
#pragma once

#include <cstdint>

namespace prefixquant {

// Orders earlier register accesses (accumulators and A fragments) before the following wgmma.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups of this warpgroup are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of `registers` across this point: it does not know that
// a wgmma in flight still writes them.
template <typename T, int kCount>
__device__ __forceinline__ void wgmma_pin(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Shared-memory descriptor of a K-major operand whose rows are 128 bytes, swizzled in 128-byte mode
// as TMA writes it: groups of 8 rows are 1024 bytes apart (the "stride" field), swizzle mode 1.
// `smem` is 1024-byte aligned; adding 2 to the descriptor advances 32 bytes along K.
__device__ __forceinline__ uint64_t wgmma_descriptor_128b(uint32_t smem) {
  constexpr uint64_t kStride1024 = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kStride1024 | (uint64_t{1} << 16) | ((smem & 0x3FFFF) >> 4);
}

// Operand lists of the instruction, eight registers at a time.
#define PQ_REGS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PQ_REGS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define PQ_REGS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define PQ_REGS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define PQ_REGS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define PQ_REGS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define PQ_REGS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define PQ_REGS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define PQ_REGS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define PQ_REGS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define PQ_REGS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define PQ_REGS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define PQ_REGS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define PQ_REGS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define PQ_REGS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define PQ_REGS_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define PQ_ACC_8(i)                                                                           \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define PQ_WGMMA_INPUTS(a, b_descriptor, accumulate) \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(accumulate)

// WgmmaS8<N>::mma(d, a, descriptor, accumulate): d = A B + (accumulate ? d : 0), asynchronously.
template <int N>
struct WgmmaS8;

template <>
struct WgmmaS8<16> {
  static __device__ __forceinline__ void mma(int32_t (&d)[8], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {" PQ_REGS_0
        "}, {%8, %9, %10, %11}, %12, p;\n}"
        : PQ_ACC_8(0)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

template <>
struct WgmmaS8<32> {
  static __device__ __forceinline__ void mma(int32_t (&d)[16], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {" PQ_REGS_0 ", " PQ_REGS_1
        "}, {%16, %17, %18, %19}, %20, p;\n}"
        : PQ_ACC_8(0), PQ_ACC_8(8)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

template <>
struct WgmmaS8<64> {
  static __device__ __forceinline__ void mma(int32_t (&d)[32], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" PQ_REGS_0 ", " PQ_REGS_1 ", " PQ_REGS_2
        ", " PQ_REGS_3 "}, {%32, %33, %34, %35}, %36, p;\n}"
        : PQ_ACC_8(0), PQ_ACC_8(8), PQ_ACC_8(16), PQ_ACC_8(24)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

template <>
struct WgmmaS8<96> {
  static __device__ __forceinline__ void mma(int32_t (&d)[48], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {" PQ_REGS_0 ", " PQ_REGS_1 ", " PQ_REGS_2
        ", " PQ_REGS_3 ", " PQ_REGS_4 ", " PQ_REGS_5 "}, {%48, %49, %50, %51}, %52, p;\n}"
        : PQ_ACC_8(0), PQ_ACC_8(8), PQ_ACC_8(16), PQ_ACC_8(24), PQ_ACC_8(32), PQ_ACC_8(40)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

template <>
struct WgmmaS8<128> {
  static __device__ __forceinline__ void mma(int32_t (&d)[64], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" PQ_REGS_0 ", " PQ_REGS_1
        ", " PQ_REGS_2 ", " PQ_REGS_3 ", " PQ_REGS_4 ", " PQ_REGS_5 ", " PQ_REGS_6 ", " PQ_REGS_7
        "}, {%64, %65, %66, %67}, %68, p;\n}"
        : PQ_ACC_8(0), PQ_ACC_8(8), PQ_ACC_8(16), PQ_ACC_8(24), PQ_ACC_8(32), PQ_ACC_8(40),
          PQ_ACC_8(48), PQ_ACC_8(56)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

template <>
struct WgmmaS8<192> {
  static __device__ __forceinline__ void mma(int32_t (&d)[96], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %101, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {" PQ_REGS_0 ", " PQ_REGS_1
        ", " PQ_REGS_2 ", " PQ_REGS_3 ", " PQ_REGS_4 ", " PQ_REGS_5 ", " PQ_REGS_6 ", " PQ_REGS_7
        ", " PQ_REGS_8 ", " PQ_REGS_9 ", " PQ_REGS_10 ", " PQ_REGS_11
        "}, {%96, %97, %98, %99}, %100, p;\n}"
        : PQ_ACC_8(0), PQ_ACC_8(8), PQ_ACC_8(16), PQ_ACC_8(24), PQ_ACC_8(32), PQ_ACC_8(40),
          PQ_ACC_8(48), PQ_ACC_8(56), PQ_ACC_8(64), PQ_ACC_8(72), PQ_ACC_8(80), PQ_ACC_8(88)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

template <>
struct WgmmaS8<256> {
  static __device__ __forceinline__ void mma(int32_t (&d)[128], const uint32_t* a,
                                             uint64_t b_descriptor, uint32_t accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" PQ_REGS_0 ", " PQ_REGS_1
        ", " PQ_REGS_2 ", " PQ_REGS_3 ", " PQ_REGS_4 ", " PQ_REGS_5 ", " PQ_REGS_6 ", " PQ_REGS_7
        ", " PQ_REGS_8 ", " PQ_REGS_9 ", " PQ_REGS_10 ", " PQ_REGS_11 ", " PQ_REGS_12
        ", " PQ_REGS_13 ", " PQ_REGS_14 ", " PQ_REGS_15 "}, {%128, %129, %130, %131}, %132, p;\n}"
        : PQ_ACC_8(0), PQ_ACC_8(8), PQ_ACC_8(16), PQ_ACC_8(24), PQ_ACC_8(32), PQ_ACC_8(40),
          PQ_ACC_8(48), PQ_ACC_8(56), PQ_ACC_8(64), PQ_ACC_8(72), PQ_ACC_8(80), PQ_ACC_8(88),
          PQ_ACC_8(96), PQ_ACC_8(104), PQ_ACC_8(112), PQ_ACC_8(120)
        : PQ_WGMMA_INPUTS(a, b_descriptor, accumulate));
  }
};

#undef PQ_REGS_0
#undef PQ_REGS_1
#undef PQ_REGS_2
#undef PQ_REGS_3
#undef PQ_REGS_4
#undef PQ_REGS_5
#undef PQ_REGS_6
#undef PQ_REGS_7
#undef PQ_REGS_8
#undef PQ_REGS_9
#undef PQ_REGS_10
#undef PQ_REGS_11
#undef PQ_REGS_12
#undef PQ_REGS_13
#undef PQ_REGS_14
#undef PQ_REGS_15
#undef PQ_ACC_8
#undef PQ_WGMMA_INPUTS

}  // namespace prefixquant
