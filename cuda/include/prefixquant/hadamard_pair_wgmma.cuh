// SPDX-License-Identifier: Apache-2.0
//
// The kernel of hadamard_wgmma.cuh for blocks of which an SM holds one or two, so that little
// overlaps their phases: the CTAs of a cluster share a block, and more of them fit.
//
// Layout: a block is [k, pow2]. A CTA transforms its share of the inputs, in all columns, a task a
//   thread, and multiplies all outputs with its share of the columns:
//   1. SwiGLU and butterflies in registers. Every warp sends its largest magnitude to all CTAs.
//   2. Integers, cut into planes: those in this CTA's columns go into its planes, those in another
//      one's into a copy of what that CTA's planes lack, which the copy engine carries there.
//   3. A warpgroup multiplies 64 outputs with 64 columns. What k has beyond tiles of 64, where that
//      is less than half a tile, is the work of the warps beyond the warpgroups, by mma.sync and
//      with the columns as rows: 16 columns x 8 outputs.
// Grid: persistent clusters that walk over the blocks, one at a time; the next one is asked for in
//   the L2 cache.
// Smem: signs and planes as core matrices as in hadamard_wgmma.cuh, the planes of this CTA's
//   columns: 32 parts of the first half of a block, from 32 parts rank on, and of the second. The
//   inputs of each CTA begin at a multiple of 16; what lies between and behind has signs 0. Every
//   plane is followed by what is sent of it, laid out as it arrives. The words of four inputs are
//   in another order for each of a CTA's 64 columns and each CTA they come from: the 4-byte stores
//   of a warp, most of which are sent, meet 32 banks.
// Barriers: `maximum` counts the maxima of all warps of the cluster, `received` the bytes of the
//   other CTAs; there may be one of the latter for each plane, so that the first product need not
//   wait for the last plane. Thread 0 announces all once a block. Every warp waits for all, in this
//   order, and sends its next maximum behind its product. So, when the maxima of block n + 1 have
//   arrived,
//   - all CTAs have multiplied block n: its planes may be written, here and there;
//   - all have received block n: what was sent of it may be written.
//   And when a warp sends one, its CTA has received block n, which the others sent after all their
//   warps had read the maxima of block n: those may be written, and no barrier is a phase ahead.
//   The warps that read planes by ldmatrix also arrive at their own CTA's `maximum`, every lane for
//   its own reads: compute-sanitizer's racecheck does not see what a maximum that is sent says.
//   Everything that is sent is waited for, and a CTA stays until the others have received.
// Limits: the blocks of kHadamardPairBlocks; no dynamic scale; rows start at multiples of 16 bytes.
#pragma once

#include "prefixquant/hadamard_exchange.cuh"
#include "prefixquant/hadamard_wgmma.cuh"
#include "prefixquant/mma.cuh"
#include "prefixquant/tma.cuh"

namespace prefixquant {

template <int kIndex>
struct HadamardPairWgmmaShape {
  static constexpr HadamardPairBlock kBlock = kHadamardPairBlocks[kIndex];
  static constexpr HadamardPairPlan kPlan = plan_hadamard_pair(kBlock);
  static constexpr int kK = kBlock.k, kPow2 = kBlock.pow2, kCtas = kBlock.ctas;
  static constexpr int kCtasPerSm = kBlock.ctas_per_sm;
  static constexpr int kWarps = kPlan.warps, kThreads = 32 * kWarps;
  static constexpr int kBlockChunks = kPow2 / 8;  // of 8 columns
  static constexpr int kCoreBytes = 128 * kPlan.chunks, kAllCores = kPlan.all_cores;
  // What multiply_cores asks for: of a CTA's columns.
  static constexpr int kSteps = kPlan.steps, kTiles = kPlan.tiles, kUnit = 64;
  static constexpr int kWarpgroups = kPlan.warpgroups;
  static constexpr int kChunks = kPlan.chunks, kRows = kPlan.rows;
  static constexpr int kCopyBytes = kPlan.copy_bytes;
  static constexpr int kSignBytes = kPlan.sign_copies * kCopyBytes;
  static constexpr int kPlaneBytes = kPlan.plane_bytes;
  static constexpr int kParts = kChunks / 8;  // of 64 columns
  static constexpr int kStarts = kRows > 64 * kTiles ? kRows : 64 * kTiles;
  // Outputs beyond the tiles, in eights, the warps that share their columns, and the products of 32
  // columns, of one copy of the signs, that such a warp makes together.
  static constexpr int kRest = kPlan.rest, kRestTiles = (kRest + 7) / 8;
  static constexpr int kRestWarps = kWarps - 4 * kWarpgroups;
  static constexpr int kRestThreads = kRest > 0 ? 32 * kRestWarps : 0;
  static constexpr int kRestQuads = kRest > 0 && kChunks / 4 > kRestWarps ? 2 : 1;
  // Barriers for what is received: one, or for 148 x 128 one for each plane (4096 rows: 207 us with
  // one, 202 with three; the other shapes have only been measured with one).
  static constexpr int kReceives = kRest > 8 ? 3 : 1;
  // Sends and prefetches: the last warp has the least to do where it has no outputs.
  static constexpr int kSender = kRest > 0 ? 0 : kThreads - 32;
  static_assert(kCtas == 2 || kCtas == 4, "the order of words");
  static_assert(kParts * kCtas <= 4, "the order of words");
  static_assert(kCtas * kWarps <= 32, "a lane reads a maximum");
  static_assert(kWarpgroups == kTiles * kParts, "a product for each warpgroup");

  // Of the inputs of CTA `rank`: groups of four, their cores in the planes, and the first ones.
  static __device__ __forceinline__ int groups(uint32_t rank) {
    return rank + 1 < kCtas ? kBlock.groups : kPlan.last_groups;
  }
  static __device__ __forceinline__ int cores(uint32_t rank) {
    return rank + 1 < kCtas ? kPlan.cores : kPlan.last_cores;
  }
  static __device__ __forceinline__ int first_group(uint32_t rank) { return rank * kBlock.groups; }
  static __device__ __forceinline__ int first_core(uint32_t rank) { return rank * kPlan.cores; }
  // In what is sent, the first core of what CTA `rank` sends to CTA `to`.
  static __device__ __forceinline__ int sent_core(uint32_t rank, uint32_t to) {
    return kAllCores + ((rank ^ to) - 1) * (kPlan.sent_cores / (kCtas - 1));
  }
  // What the index of a word among four is combined with, in columns 64 part .. of CTA `to`.
  static __device__ __forceinline__ int word_order(int part, uint32_t rank, uint32_t to) {
    return part ^ (rank ^ to) * (4 / kCtas);
  }
};

// What a CTA knows of its cluster; addresses are those of shared memory.
struct WgmmaPair {
  uint32_t rank;
  uint32_t maximum, received;  // this CTA's barriers
};

// Waits for what the other CTAs send of a block: all of it at once, or plane by plane.
template <typename Shape>
struct ReceivedPlanes {
  uint32_t received, parity;

  // Before the product of plane `plane`.
  __device__ __forceinline__ void operator()(int plane) const {
    if constexpr (Shape::kReceives > 1) {
      __syncwarp();
      mbarrier_wait(received + 8 * plane, parity);
      __syncwarp();
    }
  }
  // Before all.
  __device__ __forceinline__ void wait_if_one() const {
    if constexpr (Shape::kReceives == 1) {
      __syncwarp();
      mbarrier_wait(received, parity);
      __syncwarp();
    }
  }
};

// As keep_sign_cores.
template <typename Shape>
__device__ __forceinline__ void keep_pair_signs(const HadamardMmaArgs& p, uint32_t rank,
                                                int32_t* row_starts) {
  auto* const words = reinterpret_cast<uint32_t*>(hadamard_mma_smem());
  constexpr int kRows = Shape::kRows;
  for (int i = threadIdx.x; i < Shape::kCopyBytes / 4; i += Shape::kThreads) {
    const int row = i / 4 % kRows, core = i / 4 / kRows;
    const uint32_t owner = min(core / Shape::kPlan.cores, Shape::kCtas - 1);  // of the inputs
    const int group = 4 * (core - Shape::first_core(owner)) + i % 4;          // of its own
    const int column = 4 * (group + Shape::first_group(owner));
    const uint32_t four =
        row < Shape::kK && group < Shape::groups(owner)
            ? __ldg(reinterpret_cast<const uint32_t*>(p.signs + row * Shape::kK + column))
            : 0;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      const int order = Shape::word_order(part, owner, rank);
      words[part * Shape::kCopyBytes / 4 + (i ^ order)] = four;
    }
  }
  __syncthreads();
  for (int row = threadIdx.x; row < Shape::kStarts; row += Shape::kThreads) {
    int32_t sum = 0;
    for (int i = 0; i < 2 * Shape::kSteps && row < kRows; ++i) {
      for (int w = 0; w < 4; ++w) sum = sum_of_bytes(words[(i * kRows + row) * 4 + w], sum);
    }
    row_starts[row] = -64 * 256 * sum;
  }
}

// This warp's maximum to all CTAs; returns that of all their warps. maxima: [kCtas][kWarps].
template <typename Shape>
__device__ __forceinline__ uint32_t exchange_maximum(float largest, const WgmmaPair& pair,
                                                     uint32_t parity, const uint32_t* maxima) {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  const uint32_t bits = __reduce_max_sync(0xFFFFFFFFu, magnitude_bits(largest));
  if (lane < Shape::kCtas) {
    const uint32_t slot = smem_address(maxima + pair.rank * Shape::kWarps + threadIdx.x / 32);
    send_word_to_cluster(address_in_rank(slot, lane), bits, address_in_rank(pair.maximum, lane));
  }
  mbarrier_wait(pair.maximum, parity);
  return __reduce_max_sync(0xFFFFFFFFu, lane < Shape::kCtas * Shape::kWarps ? maxima[lane] : 0u);
}

template <typename Shape>
__device__ __forceinline__ void store_pair_planes(const WgmmaPair& pair, const IntegerScale& scale,
                                                  const float (&v)[4][8]) {
  const int group = threadIdx.x / Shape::kBlockChunks;  // of this CTA
  // CTA `to` has the columns.
  const int chunk = threadIdx.x % Shape::kChunks;
  const uint32_t to = threadIdx.x / Shape::kChunks % Shape::kCtas;
  if (group >= Shape::groups(pair.rank)) return;
  const int first_core =
      to == pair.rank ? Shape::first_core(pair.rank) : Shape::sent_core(pair.rank, to);
  char* const base = hadamard_mma_smem() + Shape::kSignBytes +
                     (first_core + group / 4) * Shape::kCoreBytes + chunk / 8 * 8 * 128 +
                     chunk % 8 * 16 + (group % 4 ^ Shape::word_order(chunk / 8, pair.rank, to)) * 4;
  store_words<Shape::kPow2>(base, Shape::kPlaneBytes, scale, v);
}

// What the other CTAs' planes lack; one thread, after a barrier behind the stores and their fences.
template <typename Shape>
__device__ __forceinline__ void send_planes(const WgmmaPair& pair) {
  const uint32_t planes = smem_address(hadamard_mma_smem()) + Shape::kSignBytes;
  const uint32_t bytes = Shape::cores(pair.rank) * Shape::kCoreBytes;
#pragma unroll 1
  for (uint32_t other = 1; other < Shape::kCtas; ++other) {
    const uint32_t to = pair.rank ^ other;
    const uint32_t barrier = address_in_rank(pair.received, to);
    const uint32_t from = planes + Shape::sent_core(pair.rank, to) * Shape::kCoreBytes;
    const uint32_t there =
        address_in_rank(planes + Shape::first_core(pair.rank) * Shape::kCoreBytes, to);
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      bulk_copy_to_cluster(there + plane * Shape::kPlaneBytes, from + plane * Shape::kPlaneBytes,
                           bytes, barrier + (Shape::kReceives > 1 ? 8 * plane : 0));
    }
  }
}

// Asks for this CTA's inputs of a block in the L2 cache; one thread.
template <typename Shape>
__device__ __forceinline__ void prefetch_pair_inputs(const HadamardMmaArgs& p, uint32_t rank,
                                                     uint32_t block) {
  if (block >= static_cast<uint32_t>(p.blocks)) return;
  const BlockOrigin origin(p, block);
  const uint32_t first = Shape::first_group(rank) * 4 * Shape::kPow2;
  const uint32_t bytes = Shape::groups(rank) * 8 * Shape::kPow2;
  prefetch_l2(p.x + origin.x_at + first, bytes);
  if (p.up) prefetch_l2(p.up + origin.up_at + first, bytes);
}

// Four neighbouring results, as store_eight<true>.
__device__ __forceinline__ void store_four(const HadamardMmaArgs& p, const float (&y)[4],
                                           const Quantizer& quantizer, int64_t at) {
  if (p.scaling != RowScale::kNone) {
    *reinterpret_cast<uint32_t*>(static_cast<int8_t*>(p.out) + at) =
        pack_low_bytes(rounded_bits(y[0], quantizer), rounded_bits(y[1], quantizer),
                       rounded_bits(y[2], quantizer), rounded_bits(y[3], quantizer));
    return;
  }
  const auto words =
      p.is_bfloat16 ? make_uint2(pack_pair(y[0], y[1], __nv_bfloat16{}),
                                 pack_pair(y[2], y[3], __nv_bfloat16{}))
                    : make_uint2(pack_pair(y[0], y[1], __half{}), pack_pair(y[2], y[3], __half{}));
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at) = words;
}

// The outputs beyond the tiles, by the warps beyond the warpgroups, in 32 kRestQuads columns at a
// time. Rows of a product are the columns of two core matrices 2 m, 2 m + 1 of the four of 32
// columns, its columns eight outputs: a lane has four neighbouring columns (hadamard_wgmma.cuh) of
// two outputs.
template <typename Shape>
__device__ __forceinline__ void finish_rest(const HadamardMmaArgs& p, const IntegerScale& scale,
                                            const int32_t* row_starts, const Quantizer& quantizer,
                                            int64_t block_at,
                                            const ReceivedPlanes<Shape>& received) {
  constexpr int kQuads = Shape::kRestQuads, kRestTiles = Shape::kRestTiles;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t signs = smem_address(hadamard_mma_smem()) +
                         (lane / 8 % 2 * Shape::kRows + 64 * Shape::kTiles) * 16 + lane % 8 * 16;
  const uint32_t planes = smem_address(hadamard_mma_smem()) + Shape::kSignBytes +
                          lane / 16 * Shape::kCoreBytes + lane / 8 % 2 * 128 + lane % 8 * 16;
  const int32_t* const starts = row_starts + 64 * Shape::kTiles + 2 * t;
#pragma unroll 1
  for (int first = (threadIdx.x / 32 - 4 * Shape::kWarpgroups) * kQuads; first < Shape::kChunks / 4;
       first += Shape::kRestWarps * kQuads) {
    const uint32_t copy = signs + first / 2 * Shape::kCopyBytes, cores = planes + first * 512;
    int32_t acc[2 * kQuads][kRestTiles][4] = {};
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
#pragma unroll
      for (int m = 0; m < 2 * kQuads; ++m) {
#pragma unroll
        for (int n = 0; n < kRestTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4 && plane > 0; ++i) {
            const uint32_t start = plane == 1 ? starts[8 * n + i % 2] : 0;
            acc[m][n][i] = static_cast<int32_t>(acc[m][n][i] * 256u + start);
          }
        }
      }
      received(plane);
// Unrolled, three eights of outputs need more registers than there are.
#pragma unroll(kRestTiles == 1 ? Shape::kSteps : 1)
      for (int step = 0; step < Shape::kSteps; ++step) {
        uint32_t columns[2 * kQuads][4];
#pragma unroll
        for (int m = 0; m < 2 * kQuads; ++m) {
          ldmatrix_x4(columns[m],
                      cores + plane * Shape::kPlaneBytes + 2 * step * Shape::kCoreBytes + 256 * m);
        }
#pragma unroll
        for (int n = 0; n < kRestTiles; ++n) {
          uint32_t outputs[2];
          ldmatrix_x2(outputs, copy + (2 * step * Shape::kRows + 8 * n) * 16);
#pragma unroll
          for (int m = 0; m < 2 * kQuads; ++m) mma_m16n8k32_u8_s8(acc[m][n], columns[m], outputs);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int column = column_of_quad<Shape>(first + i) + 4 * g;
#pragma unroll
      for (int n = 0; n < kRestTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = 64 * Shape::kTiles + 8 * n + 2 * t + c;
          float y[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            y[e] = finished_sum(acc[2 * i + e / 2][n][e % 2 * 2 + c], scale);
          }
          if (row < Shape::kK) {
            store_four(p, y, quantizer, block_at + row * Shape::kPow2 + column);
          }
        }
      }
    }
  }
}

template <typename Shape, bool kSwiglu>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
    hadamard_pair_wgmma_kernel(const HadamardMmaArgs p) {
  __shared__ alignas(8) uint64_t barriers[1 + Shape::kReceives];
  __shared__ uint32_t maxima[Shape::kCtas * Shape::kWarps];
  __shared__ int32_t row_starts[Shape::kStarts];
  static_assert(sizeof(barriers) + sizeof(maxima) + sizeof(row_starts) <= kHadamardMmaStaticSmem,
                "more than the configuration counts");
  grid_dependency_launch();
  WgmmaPair pair;
  pair.rank = cluster_cta_rank();
  pair.maximum = smem_address(&barriers[0]);
  pair.received = smem_address(&barriers[1]);
  if (threadIdx.x == 0) {
    mbarrier_init(pair.maximum, 1 + Shape::kRestThreads);
    for (int i = 0; i < Shape::kReceives; ++i) mbarrier_init(pair.received + 8 * i, 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  cluster_arrive_relaxed();
  keep_pair_signs<Shape>(p, pair.rank, row_starts);
  // L2 is where the writes of the kernel before arrive.
  if (threadIdx.x == Shape::kSender) {
    prefetch_pair_inputs<Shape>(p, pair.rank, blockIdx.x / Shape::kCtas);
  }
  __syncwarp();
  cluster_wait_acquire();
  grid_dependency_wait();

  Quantizer quantizer{1.0f, p.qmin, p.qmax};
  if (p.scaling == RowScale::kStatic) quantizer.inv_scale = number_scale(__frcp_rn(*p.scale));
  const uint32_t blocks = static_cast<uint32_t>(p.blocks), walk = gridDim.x / Shape::kCtas;
  const int groups = Shape::groups(pair.rank);
  // For a whole warp, whose lanes shuffle.
  const bool has_task = threadIdx.x / 32 * 32 < groups * Shape::kBlockChunks;
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  uint32_t parity = 0;
#pragma unroll 1
  for (uint32_t block = blockIdx.x / Shape::kCtas; block < blocks; block += walk, parity ^= 1) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(pair.maximum, sizeof(maxima));
      const uint32_t bytes = (Shape::kAllCores - Shape::cores(pair.rank)) * Shape::kCoreBytes;
      for (int i = 0; i < Shape::kReceives; ++i) {
        mbarrier_arrive_expect_tx(pair.received + 8 * i, 3 / Shape::kReceives * bytes);
      }
    }
    if (Shape::kRest > 0 && warpgroup >= Shape::kWarpgroups) mbarrier_arrive(pair.maximum);
    IntegerScale scale;
    if (has_task) {
      __syncwarp();  // as in hadamard_wgmma_kernel
      // A task beyond this CTA's inputs repeats one of them. Read anew, so that what follows from
      // it is not kept in registers around the loop.
      int thread;
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
      const int group = min(thread / Shape::kBlockChunks, groups - 1);
      float v[4][8];
      load_group<kSwiglu, Shape::kPow2>(p, BlockOrigin(p, block),
                                        Shape::first_group(pair.rank) + group,
                                        thread % Shape::kBlockChunks, v);
      int lane;
      asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
      exchange_butterflies<Shape::kPow2>(v, lane);
      float largest = 0.0f;
#pragma unroll
      for (int e = 0; e < 32; ++e) largest = larger_magnitude(largest, v[e / 8][e % 8]);
      scale = integer_scale(exchange_maximum<Shape>(largest, pair, parity, maxima), p.norm);
      store_pair_planes<Shape>(pair, scale, v);
    } else {
      scale = integer_scale(exchange_maximum<Shape>(0.0f, pair, parity, maxima), p.norm);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == Shape::kSender) {
      send_planes<Shape>(pair);
      prefetch_pair_inputs<Shape>(p, pair.rank, block + walk);
    }
    if (p.scaling != RowScale::kNone) scale = scale_for_levels(scale);
    const int64_t block_at =
        static_cast<int64_t>(block) * (Shape::kK * Shape::kPow2) + pair.rank * (4 * Shape::kChunks);
    const ReceivedPlanes<Shape> received{pair.received, parity};
    received.wait_if_one();
    if (warpgroup < Shape::kWarpgroups) {
      const int tile = warpgroup / Shape::kParts, part = warpgroup % Shape::kParts;
      int32_t acc[Shape::kUnit / 2];
      multiply_cores<Shape>(row_starts, tile, part, acc, received);
      if (64 * tile + static_cast<int>(threadIdx.x) / 32 % 4 * 16 < Shape::kK) {
        float unused = 0.0f;
        finish_sums<Shape>(p, scale, quantizer, Shape::kK, tile, part, block_at, false, acc,
                           unused);
      }
    } else if constexpr (Shape::kRest > 0) {
      finish_rest<Shape>(p, scale, row_starts, quantizer, block_at, received);
    }
  }
  // What this CTA sent of the last block is read from its shared memory until it has arrived.
  __syncwarp();
  cluster_sync_execution();
}

}  // namespace prefixquant
