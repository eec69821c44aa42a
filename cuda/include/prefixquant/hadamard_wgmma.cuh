// SPDX-License-Identifier: Apache-2.0
//
// hadamard_mma.cuh for sm_90a: the product is wgmma, which reads signs and planes from shared
// memory itself. (Fragments of mma.sync are loaded once for each 16 outputs: that took more of the
// bandwidth of shared memory, and of the instructions, than everything else.)
//
// Layout: as in hadamard_mma.cuh with one task a thread; a warpgroup multiplies tiles of 64 outputs
//   and 64 columns.
// Smem: signs [inputs, outputs] and the three planes [inputs, columns] as core matrices of 8 rows
//   x 16 bytes: [16 inputs][8 outputs or columns][one of 8][one of 16 inputs]. Column
//   pow2 / 2 q + 32 part + 8 t + 4 h + e of a block is row 64 part + 8 (4 q + e) + 2 t + h: a
//   thread's accumulators are eight neighbours for each q, and its transformed values are those of
//   e and q (exchange_butterflies). The words of four inputs are in another order for each part,
//   and so they are in a copy of the signs that it is multiplied with: the 4-byte stores of a warp,
//   which has 256 / pow2 words for each of pow2 / 8 columns, then meet 32 banks. With 2^m = 256,
//   one CTA an SM, also the x of the next block, copied while this one's products are made.
// Limits: pow2 of 64, 128 or 256, 64 < k <= 80 or 96 < k <= 192, a task a thread.
#pragma once

#include "prefixquant/hadamard_mma.cuh"
#include "prefixquant/mbarrier.cuh"
#include "prefixquant/tma.cuh"
#include "prefixquant/wgmma.cuh"

namespace prefixquant {

template <int kSteps_, int kPow2_>
struct HadamardWgmmaShape {
  static constexpr int kSteps = kSteps_, kPow2 = kPow2_;  // k > 32 (kSteps - 1)
  static constexpr int kTiles = (kSteps + 1) / 2;         // of 64 outputs
  static constexpr int kWarpgroups = hadamard_wgmma_warpgroups(kSteps, kPow2);
  static constexpr int kMaxThreads = hadamard_wgmma_max_threads(kSteps, kPow2);
  static constexpr int kChunks = kPow2 / 8;  // of 8 columns
  // Outputs that the signs have: a tile may reach beyond, into what is never an output.
  static constexpr int kRows = 32 * kSteps;
  static constexpr int kCopies = kPow2 / 64, kCopyBytes = 2 * kSteps * kRows * 16;
  static constexpr int kSignBytes = kCopies * kCopyBytes;
  static constexpr int kPlaneBytes = 2 * kSteps * kChunks * 128;
  static constexpr int kCtasPerSm = hadamard_wgmma_ctas_per_sm(kMaxThreads);
  // Whether products want more warps than there are tasks, for some k.
  static constexpr bool kIdleWarps = 4 * kWarpgroups > ((8 * kSteps - 7) * kChunks + 31) / 32;
  static constexpr bool kStagesX = hadamard_wgmma_stages_x(kPow2);
  // Columns of a product: 64 want 58 registers.
  static constexpr int kUnit = kMaxThreads * kCtasPerSm > 1024 ? 32 : 64;
};

// d (+)= A B, A signed and B unsigned bytes, 64 x 64 x 32 or 64 x 32 x 32, asynchronously.
template <bool kAdd>
__device__ __forceinline__ void wgmma_s8_u8(int32_t (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, %34;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),
        "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]),
        "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]),
        "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),
        "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
      : "l"(a), "l"(b), "n"(kAdd));
}

template <bool kAdd>
__device__ __forceinline__ void wgmma_s8_u8(int32_t (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.u8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, %18;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]),
        "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]),
        "+r"(d[14]), "+r"(d[15])
      : "l"(a), "l"(b), "n"(kAdd));
}

// Descriptor of a K-major operand of core matrices without swizzle: 8 rows further is 128 bytes,
// 16 bytes of K further `k_stride` bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor_cores(uint32_t smem, uint32_t k_stride) {
  return uint64_t{128 >> 4} << 32 | uint64_t{k_stride >> 4} << 16 | (smem & 0x3FFFF) >> 4;
}

// What the index of a word among four is combined with in the 64 columns of a part.
template <typename Shape>
__device__ __forceinline__ int word_order(int part) {
  return part * (4 / Shape::kCopies) % 4;
}

// Signs into shared memory, and what each row of outputs has too little after its high plane,
// shifted as that is; once a CTA.
template <typename Shape>
__device__ __forceinline__ void keep_sign_cores(const HadamardMmaArgs& p, int32_t* row_starts) {
  auto* const words = reinterpret_cast<uint32_t*>(hadamard_mma_smem());
  constexpr int kRows = Shape::kRows;
  for (int i = threadIdx.x; i < Shape::kCopyBytes / 4; i += blockDim.x) {
    const int row = i / 4 % kRows, column = i / 4 / kRows * 16 + i % 4 * 4;
    const uint32_t four =
        row < p.k && column < p.k
            ? __ldg(reinterpret_cast<const uint32_t*>(p.signs + row * p.k + column))
            : 0;
#pragma unroll
    for (int copy = 0; copy < Shape::kCopies; ++copy) {
      words[copy * Shape::kCopyBytes / 4 + (i ^ word_order<Shape>(copy))] = four;
    }
  }
  __syncthreads();
  for (int row = threadIdx.x; row < 64 * Shape::kTiles; row += blockDim.x) {
    int32_t sum = 0;
    for (int i = 0; i < 2 * Shape::kSteps && row < kRows; ++i) {
      for (int w = 0; w < 4; ++w) sum = sum_of_bytes(words[(i * kRows + row) * 4 + w], sum);
    }
    row_starts[row] = -64 * 256 * sum;
  }
}

// Four inputs, behind exchange_butterflies, into the planes: the words of columns e of q are
// 512 q + 128 e bytes behind `base`.
template <int kPow2>
__device__ __forceinline__ void store_words(char* base, int plane_bytes, const IntegerScale& scale,
                                            const float (&v)[4][8]) {
  // Read anew: kept since the shuffles, or around the loop over the blocks, what follows from the
  // lane would cost registers.
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  IntegerScale signed_scale[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    signed_scale[q].to_integer =
        __uint_as_float(__float_as_uint(scale.to_integer) ^ exchanged_sign<kPow2>(lane, q));
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    uint32_t x[4], high, middle, low;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = offset_integer(v[j][c], signed_scale[c / 4]);
    split_in_planes(x, high, middle, low);
    char* const to = base + c * 128;
    *reinterpret_cast<uint32_t*>(to) = high;
    *reinterpret_cast<uint32_t*>(to + plane_bytes) = middle;
    *reinterpret_cast<uint32_t*>(to + 2 * plane_bytes) = low;
  }
}

template <typename Shape>
__device__ __forceinline__ void store_plane_cores(const HadamardMmaArgs& p,
                                                  const IntegerScale& scale,
                                                  const float (&v)[4][8]) {
  const int group = threadIdx.x / Shape::kChunks, chunk = threadIdx.x % Shape::kChunks;
  if (4 * group >= p.k) return;
  char* const base = hadamard_mma_smem() + Shape::kSignBytes +
                     (group / 4 * Shape::kChunks + chunk / 8 * 8) * 128 + chunk % 8 * 16 +
                     (group % 4 ^ word_order<Shape>(chunk / 8)) * 4;
  store_words<Shape::kPow2>(base, Shape::kPlaneBytes, scale, v);
}

// ---- x in shared memory ----

template <typename Shape>
__device__ __forceinline__ char* staged_x() {
  return hadamard_mma_smem() + Shape::kSignBytes + 3 * Shape::kPlaneBytes;
}

// Copies the x of a block to shared memory; one thread.
template <typename Shape>
__device__ __forceinline__ void stage_x(const HadamardMmaArgs& p, uint32_t block,
                                        uint32_t barrier) {
  const uint32_t bytes = 2 * p.block_size;
  if (block >= static_cast<uint32_t>(p.blocks)) return;
  mbarrier_arrive_expect_tx(barrier, bytes);
  bulk_load(smem_address(staged_x<Shape>()), p.x + BlockOrigin(p, block).x_at, bytes, barrier,
            kL2EvictNormal);
}

// Asks for the x of a block, and for the up of the one before, in the L2 cache; one thread.
__device__ __forceinline__ void prefetch_ahead(const HadamardMmaArgs& p, uint32_t block,
                                               uint32_t before) {
  if (block < static_cast<uint32_t>(p.blocks)) {
    prefetch_l2(p.x + BlockOrigin(p, block).x_at, 2 * p.block_size);
  }
  if (p.up && before < static_cast<uint32_t>(p.blocks)) {
    prefetch_l2(p.up + BlockOrigin(p, before).up_at, 2 * p.block_size);
  }
}

// As load_task with a staged x. The loads of up are under way while it is waited for.
template <bool kSwiglu, typename Shape>
__device__ __forceinline__ void load_staged_task(const HadamardMmaArgs& p,
                                                 const BlockOrigin& origin, uint32_t barrier,
                                                 uint32_t parity, float (&v)[4][8]) {
  const uint32_t group = min(static_cast<int>(threadIdx.x) / Shape::kChunks, p.k / 4 - 1);
  const uint32_t at = 4 * group * Shape::kPow2 + 8 * (threadIdx.x % Shape::kChunks);
  RawTile<kSwiglu, 4> raw;
  if constexpr (kSwiglu) {
    const uint16_t* const up = p.up + origin.up_at + at;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw.up[j] = *reinterpret_cast<const uint4*>(up + j * Shape::kPow2);
    }
  }
  mbarrier_wait(barrier, parity);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    raw.x[j] = *reinterpret_cast<const uint4*>(staged_x<Shape>() + 2 * (at + j * Shape::kPow2));
  }
  raw.values(p.is_bfloat16, v);
}

// 256, which the compiler does not know: half of the shifts between the planes are multiplications,
// which another unit does than shifts; all warps make them at the same time.
static __constant__ uint32_t kByteStep = 256;

// acc = 256 acc + starts of its rows
template <int kCount>
__device__ __forceinline__ void shift_and_start(const int32_t* row_starts, int32_t (&acc)[kCount]) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t start = row_starts[row + 8 * h];
#pragma unroll
    for (int i = 2 * h; i < kCount; i += 4) {
      acc[i] = static_cast<int32_t>(acc[i] * 256u + start);
      acc[i + 1] = static_cast<int32_t>(acc[i + 1] * kByteStep + start);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void shift_left_8(int32_t (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    acc[i] = static_cast<int32_t>(acc[i] * (i % 2 == 0 ? 256u : kByteStep));
  }
}

struct NoWait {
  __device__ __forceinline__ void operator()(int) const {}
};

// 64 outputs of tile `tile` x the kUnit columns number `unit`, each plane behind wait(plane).
template <typename Shape, typename Wait = NoWait>
__device__ __forceinline__ void multiply_cores(const int32_t* row_starts, int tile, int unit,
                                               int32_t (&acc)[Shape::kUnit / 2],
                                               const Wait& wait = {}) {
  const uint32_t smem = smem_address(hadamard_mma_smem());
  const int copy = Shape::kUnit * unit / 64;
  const uint64_t a =
      wgmma_descriptor_cores(smem + Shape::kCopyBytes * copy + 1024 * tile, 16 * Shape::kRows);
  const uint64_t b = wgmma_descriptor_cores(smem + Shape::kSignBytes + 16 * Shape::kUnit * unit,
                                            128 * Shape::kChunks);
  // Defined for the compiler, without an instruction: the first product overwrites them.
#pragma unroll
  for (int i = 0; i < Shape::kUnit / 2; ++i) asm volatile("" : "=r"(acc[i]));
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    if (plane == 1) shift_and_start(row_starts + 64 * tile, acc);
    if (plane == 2) shift_left_8(acc);
    wait(plane);
    wgmma_pin(acc);
    wgmma_fence();
    const uint64_t b_plane = b + plane * Shape::kPlaneBytes / 16;
    if (plane == 0) {
      wgmma_s8_u8<false>(acc, a, b_plane);
    } else {
      wgmma_s8_u8<true>(acc, a, b_plane);
    }
#pragma unroll
    for (int step = 1; step < Shape::kSteps; ++step) {
      wgmma_s8_u8<true>(acc, a + step * 2 * Shape::kRows,
                        b_plane + step * 2 * 128 * Shape::kChunks / 16);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(acc);
  }
}

// The first of the 32 columns, of a block or behind a CTA's first, whose rows in the planes are
// 32 quad .. + 31.
template <typename Shape>
__device__ __forceinline__ int column_of_quad(int quad) {
  return quad / 2 * 32 + quad % 2 * (Shape::kPow2 / 2);
}

// The sums of a product of 64 outputs: collected in `largest` where `maximum`, otherwise stored as
// the block at block_at, of `outputs` outputs.
template <typename Shape>
__device__ __forceinline__ void finish_sums(const HadamardMmaArgs& p, const IntegerScale& scale,
                                            const Quantizer& quantizer, int outputs, int tile,
                                            int unit, int64_t block_at, bool maximum,
                                            const int32_t (&acc)[Shape::kUnit / 2],
                                            float& largest) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool bounded = sums_are_bounded(outputs, scale, quantizer.inv_scale, kBoundedLevel);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 64 * tile + 16 * warp + 8 * h + lane / 4;
#pragma unroll
    for (int q = 0; q < Shape::kUnit / 32; ++q) {
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        y[i] = finished_sum(acc[4 * (4 * q + i % 4) + 2 * h + i / 4], scale);
      }
      if (maximum) {
#pragma unroll
        for (int e = 0; e < 8; ++e) largest = larger_magnitude(largest, y[e]);
      } else if (row < outputs) {
        const int column = column_of_quad<Shape>(Shape::kUnit / 32 * unit + q) + lane % 4 * 8;
        store_eight<true>(p, y, quantizer, block_at + row * Shape::kPow2 + column, bounded);
      }
    }
  }
}

// What this warpgroup multiplies, if it is one that does; `largest` collects the magnitudes where
// `maximum`, otherwise the results are stored.
template <typename Shape>
__device__ __forceinline__ void finish_tiles(const HadamardMmaArgs& p, const IntegerScale& scale,
                                             const int32_t* row_starts, const Quantizer& quantizer,
                                             int64_t block_at, bool maximum, float& largest) {
  constexpr int kUnits = Shape::kPow2 / Shape::kUnit;  // of a tile
  const int warp = threadIdx.x / 32 % 4;
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (warpgroup >= Shape::kWarpgroups) return;
#pragma unroll 1
  for (int i = warpgroup; i < Shape::kTiles * kUnits; i += Shape::kWarpgroups) {
    const int tile = i / kUnits, unit = i % kUnits;  // the last tile has the fewest outputs
    int32_t acc[Shape::kUnit / 2];
    multiply_cores<Shape>(row_starts, tile, unit, acc);
    if (64 * tile + 16 * warp >= p.k) continue;  // nothing of this warp is an output
    finish_sums<Shape>(p, scale, quantizer, p.k, tile, unit, block_at, maximum, acc, largest);
  }
}

// The barrier for the maximum, of all threads: warps with a task wait, the others only arrive.
constexpr int kMaximumBarrier = 1;

__device__ __forceinline__ void arrive_for_maximum() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kMaximumBarrier), "r"(blockDim.x) : "memory");
}

// block_max for warps with a task; the other warps' and all further maxima are 0. The lane is read
// anew: kept since the shuffles it would cost a register.
__device__ __forceinline__ uint32_t wait_for_maximum(uint32_t v, uint32_t* maxima) {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  v = __reduce_max_sync(0xFFFFFFFFu, v);
  if (lane == 0) maxima[threadIdx.x / 32] = v;
  named_barrier_sync(kMaximumBarrier, blockDim.x);
  return __reduce_max_sync(0xFFFFFFFFu, maxima[lane]);
}

// Warps with a task wait twice a block: for the maximum, and at __syncthreads for the planes. The
// others arrive at the first and wait at the second. (One path for both would keep v in registers
// around the loop; two waits at one barrier are divergence to compute-sanitizer.)
//   Generations: between two arrivals of a warp all warps meet at __syncthreads, which those with a
//     task reach after the first of the two barriers: an arrival never counts for the one before.
//   maxima[warp]: written before the first barrier, read by warps with a task until the second,
//     after which come the next block's writes. The zeros are written once, before the
//     __syncthreads of the signs.
//   block_maxima: written by thread 0 between the barriers, read by warps without a task after the
//     second. The next block's goes to the other word, so that another __syncthreads lies between a
//     read and the write after it. Both by atomics, as the maxima of the outputs: compute-sanitizer
//     does not see that a warp which arrived at the first barrier without waiting there still meets
//     the others at the second, and later.
//   The staged x: read before the first barrier, behind which thread 0 asks for the next one.
//   Planes: written between the barriers. A warp arrives for the next block when its products,
//     which read them, are done (wgmma_wait).
template <typename Shape, bool kSwiglu>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kCtasPerSm)
    hadamard_wgmma_kernel(const HadamardMmaArgs p) {
  __shared__ uint32_t maxima[32], output_maxima[Shape::kMaxThreads / 32];
  __shared__ uint32_t block_maxima[2];
  __shared__ int32_t row_starts[64 * Shape::kTiles];
  __shared__ alignas(8) uint64_t staged_barrier;
  static_assert(sizeof(maxima) + sizeof(output_maxima) + sizeof(block_maxima) + sizeof(row_starts) +
                        sizeof(staged_barrier) <=
                    kHadamardMmaStaticSmem,
                "more than the configuration counts");
  grid_dependency_launch();
  const uint32_t staged = smem_address(&staged_barrier);
  if (Shape::kStagesX && threadIdx.x == 0) {
    mbarrier_init(staged, 1);
    fence_mbarrier_init();
  }
  if (threadIdx.x < 32) maxima[threadIdx.x] = 0;
  keep_sign_cores<Shape>(p, row_starts);
  prefetch_block(p, blockIdx.x);  // L2 is where the writes of the kernel before arrive
  grid_dependency_wait();
  if (Shape::kStagesX && threadIdx.x == 0) {
    stage_x<Shape>(p, blockIdx.x, staged);
    prefetch_ahead(p, blockIdx.x + gridDim.x, p.blocks);
  }
  __syncwarp();
  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if (p.scaling == RowScale::kStatic) quantizer.inv_scale = number_scale(__frcp_rn(*p.scale));
  // For a whole warp, whose lanes shuffle.
  const bool has_task = threadIdx.x / 32 * 32 < p.k / 4 * Shape::kChunks;
  int parity = 0;
#pragma unroll 1
  for (uint32_t block = blockIdx.x; block < static_cast<uint32_t>(p.blocks); block += gridDim.x) {
    const BlockOrigin origin(p, block);
    IntegerScale scale;
    if (has_task) {
      float v[4][8];
      if constexpr (Shape::kStagesX) {
        load_staged_task<kSwiglu, Shape>(p, origin, staged, parity, v);
      } else {
        // For the compiler, which otherwise writes the shuffles once more for diverged warps.
        __syncwarp();
        load_task<kSwiglu, Shape>(p, origin, threadIdx.x, v);
      }
      exchange_butterflies<Shape::kPow2>(v, threadIdx.x % 32);
      float largest = 0.0f;
#pragma unroll
      for (int e = 0; e < 32; ++e) largest = larger_magnitude(largest, v[e / 8][e % 8]);
      const uint32_t bits = wait_for_maximum(magnitude_bits(largest), maxima);
      if (threadIdx.x == 0) {
        if constexpr (Shape::kIdleWarps) {
          atomicExch(&block_maxima[parity], bits);
        } else {
          block_maxima[parity] = bits;
        }
      }
      // All warps have read the x of this block.
      if (Shape::kStagesX && threadIdx.x == 0) stage_x<Shape>(p, block + gridDim.x, staged);
      scale = integer_scale(bits, p.norm);
      store_plane_cores<Shape>(p, scale, v);
    } else {
      arrive_for_maximum();
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (!has_task) {
      const uint32_t bits = Shape::kIdleWarps ? atomicMax(&block_maxima[parity], 0u)  // reads it
                                              : block_maxima[parity];
      // Reduced, though it is one: for the compiler it is then the warp's, in no lane's register.
      scale = integer_scale(__reduce_max_sync(0xFFFFFFFFu, bits), p.norm);
    }
    parity ^= 1;
    if constexpr (Shape::kStagesX) {
      if (threadIdx.x == 0) prefetch_ahead(p, block + 2 * gridDim.x, block + gridDim.x);
      __syncwarp();
    } else {
      prefetch_block(p, block + gridDim.x);
    }
    const int64_t block_at = static_cast<int64_t>(block) * p.block_size;
    constexpr bool kAtomic = Shape::kIdleWarps;
    finish_block<kAtomic>(p, origin.row, quantizer, output_maxima, [&](bool maximum, float& seen) {
      const bool levels = !maximum && p.scaling != RowScale::kNone;
      finish_tiles<Shape>(p, levels ? scale_for_levels(scale) : scale, row_starts, quantizer,
                          block_at, maximum, seen);
    });
  }
}

}  // namespace prefixquant
