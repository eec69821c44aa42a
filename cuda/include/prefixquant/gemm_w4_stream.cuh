// SPDX-License-Identifier: Apache-2.0
// Computes y[m, n] = epilogue(sum_k x[m, k] w[n, k]) for one to eight tokens on sm_90 and later:
// the GEMV whose weights stream through shared memory, so that memory is never idle between two
// launches that follow each other.
//
// Layout  as gemm_w4_mma.cuh: x int8 [m, k], weights prepacked (layout_w4.h), epilogue gemm_w4.h.
// Grid    x = groups of 64 channels, y = k splits, one cluster.
//         A CTA owns 64 channels x all tokens x one k split. Two groups of four warps take the
//         stages of 128 k in turn, each warp 16 channels of every stage of its group; a ninth warp
//         feeds the copy engine.
// Smem    gemm_w4_stream_plan.h: barriers, what the other splits send, the ring (4 KB a stage, int8
//         8 KB), the activations of the split (tokens x (k / splits + 16) bytes). The partial sums
//         take the place of the ring at the end.
// Limits  m <= 8, k <= 131071 (mma_tile.cuh), splits 1, 2, 4 or 8, and the smem must fit.
//
// Why: the register ring of gemm_w4_mma.cuh loads at full speed, but at the end of a launch memory
// idles while the last sums are added, stored and flushed, the next kernel starts, waits, and reads
// its activations: about 2.4 us, a fifth of 4096 x 14336. The ring here belongs to the copy engine.
// A CTA of the next launch fits beside this one and fills its ring, up to 96 KB, in that gap: it
// starts when this CTA's last loads have left (`release_stages`), and needs no activations for it.
#pragma once

#include "prefixquant/gemm_w4_mma.cuh"
#include "prefixquant/gemm_w4_stream_plan.h"
#include "prefixquant/tma.cuh"

namespace prefixquant {

struct GemmW4StreamLaunch {
  GemmW4MmaLaunch mma;  // chunk_units, chunk_buffers, token_tiles and late_trigger are not used
  StreamSmem smem;
  int split_stages;    // of 128 k; the last split may have fewer
  int ring_stages;     // slots of the ring; see is_stream_ring()
  int release_stages;  // the next launch may start when so many stages of the split are left
};

// Four row warps x two k-warps; the stages in flight are those of the ring, not of registers.
template <int WeightBits>
using StreamGeometry = MmaGeometry<WeightBits, 1, 1, 4, kStreamGroups, 1, false>;

inline constexpr int kStreamUnits = kStreamStageK / kUnitK;

// The ring of weights. A slot is full when its bytes have landed, empty when the four warps that
// multiply them have read them. Stage i of a split goes through slot i modulo `slots`.
template <class G>
struct StreamRing {
  static constexpr int kStageBytes = stream_stage_bytes(G::kWeightBits);
  uint32_t barriers;       // full and empty of slot 0, full and empty of slot 1, ..
  uint32_t data;           // shared address of slot 0
  const uint8_t* weights;  // stage 0 of this CTA's split
  int slots;

  // Where a reader or the writer is in the ring.
  struct Cursor {
    int slot;
    uint32_t parity;
  };
  __device__ __forceinline__ void advance(Cursor& at, int stages) const {  // stages <= slots
    at.slot += stages;
    if (at.slot >= slots) at.slot -= slots, at.parity ^= 1;
  }
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 16 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(slot) + 8; }
  __device__ __forceinline__ uint32_t stage(int slot) const { return data + slot * kStageBytes; }

  __device__ __forceinline__ void load(int i, int slot) const {
    mbarrier_arrive_expect_tx(full(slot), kStageBytes);
    bulk_load(stage(slot), weights + int64_t{i} * kStageBytes, kStageBytes, full(slot),
              kL2EvictFirst);
  }
  // Prepares the barriers; each first load leaves as soon as its own are ready.
  __device__ __forceinline__ void start(int stages) const {
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), 32 * G::kRowWarps);
      fence_mbarrier_init();
      if (slot < stages) load(slot, slot);
    }
  }
  __device__ __forceinline__ void refill(int stages) const {
    Cursor at = {0, 0};
#pragma unroll 1
    for (int i = slots; i < stages; ++i) {
      mbarrier_wait(empty(at.slot), at.parity);
      load(i, at.slot);
      advance(at, 1);
    }
  }
};

template <class G>
__global__ void __launch_bounds__(G::kThreads + 32, kStreamCtasPerSm)
    gemm_w4_stream_kernel(const __grid_constant__ GemmW4StreamLaunch launch) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char smem[];
  const GemmW4MmaLaunch& p = launch.mma;
  const StreamSmem& at = launch.smem;
  // The broadcast tells the compiler that a warp's addresses are uniform.
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int row_warp = warp % G::kRowWarps, k_warp = warp / G::kRowWarps;
  const bool is_producer = k_warp == G::kKWarps;
  const int tokens = p.epilogue.m, splits = 1 << p.log2_splits;

  const int all_stages = stream_stages_of(p.k);
  const int begin = min(static_cast<int>(blockIdx.y) * launch.split_stages, all_stages);
  const int stages = min(launch.split_stages, all_stages - begin);
  const int first_stage = static_cast<int>(blockIdx.x) * all_stages + begin;

  const uint32_t base = smem_address(smem);
  using Ring = StreamRing<G>;
  const uint8_t* const weights = static_cast<const uint8_t*>(p.weight);
  const Ring ring = {base + at.ring_barriers, base + at.ring,
                     weights + int64_t{first_stage} * Ring::kStageBytes, launch.ring_stages};
  if (is_producer) {
    if (!p.weight_is_constant) grid_dependency_wait();
    if (lane == 0) ring.start(stages);
    __syncwarp();
  }
  if (splits > 1) {
    prepare_to_receive(base, at.received_bytes);
    cluster_arrive_relaxed();
  }
  grid_dependency_wait();
  if (!is_producer && stages > 0)
    fetch_activations<G>(base + at.x, at.x_row_bytes, p.x, p.x_row_stride, tokens,
                         kStreamStageK * begin, kStreamStageK * stages, p.k);
  cp_async_commit();
  const int release_at = max(0, stages - launch.release_stages);
  if (release_at == 0) grid_dependency_launch();
  const int my_pairs = (G::kRows / 2) >> p.log2_splits;  // channel pairs this CTA finishes
  const int channel = static_cast<int>(blockIdx.x) * G::kRows +
                      2 * (blockIdx.y * my_pairs + (threadIdx.x & (my_pairs - 1)));
  const ScalePair scales = load_scale_pair(p.epilogue, channel);
  cp_async_wait<0>();
  __syncthreads();  // activations have landed, the ring's barriers are ready

  int32_t sums[kStreamUnits][1][1][4] = {};  // one set a unit: two chains of products, not one
  if (is_producer) {
    if (lane == 0) ring.refill(stages);
    __syncwarp();
    if (release_at > 0) grid_dependency_launch();
  } else {
    uint32_t x_row_offset[1];
    activation_row_offsets<G>(x_row_offset, tokens, at.x_row_bytes);
    uint32_t lane_offset = row_warp * 512 + lane * 16;  // in each fragment block
    // Computed once, and not again in every round of the loop to save a register.
    asm volatile("" : "+r"(x_row_offset[0]), "+r"(lane_offset));
    typename Ring::Cursor cursor = {k_warp, 0};
    bool released = release_at == 0;
    for (int i = k_warp; i < stages; i += G::kKWarps) {
      if (!released && i >= release_at) grid_dependency_launch(), released = true;
      mbarrier_wait(ring.full(cursor.slot), cursor.parity);
      uint4 w[kStreamUnits][1][G::kLoads];
      const uint32_t w_smem = ring.stage(cursor.slot) + lane_offset;
#pragma unroll
      for (int u = 0; u < kStreamUnits; ++u)
#pragma unroll
        for (int l = 0; l < G::kLoads; ++l)
          w[u][0][l] = load_shared_16(w_smem + (u * G::kLoads + l) * kFragmentBlockBytes);
#pragma unroll
      for (int u = 0; u < kStreamUnits; ++u)
        multiply_unit<G>(sums[u], w[u], base + at.x + kStreamStageK * i + kUnitK * u, x_row_offset);
      // Every lane speaks for its own reads. One lane for the warp, after a __syncwarp(), is no
      // faster, and compute-sanitizer's racecheck does not see the other lanes through it.
      mbarrier_arrive(ring.empty(cursor.slot));
      ring.advance(cursor, G::kKWarps);
    }
#pragma unroll
    for (int u = 1; u < kStreamUnits; ++u)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[0][0][0][c] += sums[u][0][0][c];
  }

  __syncthreads();  // the partial sums take the place of the ring
  int32_t* const slabs = reinterpret_cast<int32_t*>(smem + at.ring);
  if (!is_producer)
    store_partial_sums<G>(slabs + k_warp * tokens * G::kPartialStride, sums[0], tokens, row_warp);
  // The producer's threads find no token left for them there: 8 are dealt to the others.
  static_assert(G::kThreads / (G::kRows / 2) >= 8, "a thread of its own for each token and pair");
  mma_detail::finish_tile<G>(p, slabs, reinterpret_cast<int32_t*>(smem + at.received), base, tokens,
                             0, channel, scales);
#else
  __trap();  // bulk copies and clusters exist from sm_90 on
#endif
}

}  // namespace prefixquant
