// SPDX-License-Identifier: Apache-2.0
// Computes y[m, n] = epilogue(sum_k x[m, k] w[n, k]) with mma.sync on int8 activations and int4 or
// int8 weights: the GEMV (M = 1), the skinny GEMM, and the kernel for any M on every arch without
// wgmma. One kernel, many geometries.
//
// Layout  x: int8 [m, k] row-major, row stride a multiple of 16, 16-byte aligned.
//         weight: prepacked int4 or int8 (layout_w4.h). Epilogue: gemm_w4.h.
// Grid    x = row tiles x token tiles, the token tile running fastest: neighbours share weights
//         through L2; y = k splits, one cluster.
//         A CTA owns 16 kRowTiles kRowWarps channels x 8 kTokenTiles tokens x one k split; its
//         k-warps take the 64-k units of the split in turn.
// Smem    [mbarrier, 16 bytes]
//         [what the other splits send: (splits - 1) / splits x tokens x rows x 4 bytes]
//         [the larger of the activation buffers, tokens x (64 chunk_units + 16) bytes each, and of
//         kKWarps slabs of int32 partial sums, tokens x (rows + 4)].
// Limits  k <= 131071 (mma_tile.cuh); splits a power of two up to 8, 1 before sm_90.
//
// Weights are read once, so nothing is gained by staging them in shared memory: every lane keeps
// kStages 16-byte loads per row tile in flight in registers. Little's law: 3.1 TB/s x ~700 ns =
// 16.5 KB in flight per SM of an H100; 8 warps with 8 loads a lane are 32 KB, and 2 to 4 such CTAs
// fit an SM. The activations of a chunk of k are fetched while the chunk before is multiplied.
#pragma once

#include "prefixquant/mma_tile.cuh"

namespace prefixquant {

struct GemmW4MmaLaunch {
  EpilogueArgs epilogue;
  bool epilogue_is_plain;
  const int8_t* x;
  int64_t x_row_stride;
  const void* weight;
  int k;
  int token_tiles;    // CTA tiles along the tokens
  int chunk_units;    // units per activation buffer, a multiple of kKWarps x kStages
  int chunk_buffers;  // 2, or 1 where one chunk is all
  int log2_splits;
  bool late_trigger;        // let the next kernel start when the last loads have left, not at once
  bool weight_is_constant;  // prefetch weights before the previous kernel has finished
};

namespace mma_detail {

inline constexpr int kBarrierBytes = 16;

// What the other CTAs of the cluster send to one, and the room it gets (16-byte aligned).
__host__ __device__ constexpr int received_bytes(int tokens, int rows, int splits) {
  return (splits - 1) * tokens * (rows / splits) * 4;
}
__host__ __device__ constexpr int received_room(int tokens, int rows, int splits) {
  return (received_bytes(tokens, rows, splits) + 15) / 16 * 16;
}

// Adds the k-warps' slabs and the cluster's k splits, applies the epilogue and stores. Each CTA of
// the cluster finishes kRows / splits channels, two a thread, and sends the others their part.
template <class G>
__device__ __forceinline__ void finish_tile(const GemmW4MmaLaunch& p, const int32_t* slabs,
                                            int32_t* received, uint32_t barrier, int tokens,
                                            int token_begin, int channel, const ScalePair& scales) {
  constexpr int kPairs = G::kRows / 2;
  const int slab_size = tokens * G::kPartialStride;
  __syncthreads();
  const float2 scale = scales.product();
  if (p.log2_splits == 0) {
    for (int token = threadIdx.x / kPairs; token < tokens; token += G::kThreads / kPairs) {
      const int at = token * G::kPartialStride + 2 * (threadIdx.x % kPairs);
      finish_and_store_pair(p.epilogue, p.epilogue_is_plain,
                            sum_partial_pair<G>(slabs + at, slab_size), scale, channel,
                            token_begin + token);
    }
    return;
  }
  const int my_pairs = kPairs >> p.log2_splits;
  const int part_size = 2 * my_pairs * tokens;  // int32 values that one CTA sends another
  cluster_wait_acquire();                       // all mbarriers of the cluster are ready
  for (int token = threadIdx.x / kPairs; token < tokens; token += G::kThreads / kPairs) {
    const int pair = threadIdx.x % kPairs, owner = pair / my_pairs;
    if (owner == blockIdx.y) continue;
    const int2 sum = sum_partial_pair<G>(slabs + token * G::kPartialStride + 2 * pair, slab_size);
    const int slot = blockIdx.y - (static_cast<int>(blockIdx.y) > owner ? 1 : 0);
    const int32_t* to = received + slot * part_size + 2 * (token * my_pairs + pair % my_pairs);
    cluster_send_int2(smem_address(to), sum, barrier, owner);
  }
  const int pair = threadIdx.x & (my_pairs - 1), first_pair = blockIdx.y * my_pairs;
  const int first_token = threadIdx.x / my_pairs, token_step = G::kThreads / my_pairs;
  cluster_wait_received(barrier);
  for (int token = first_token; token < tokens; token += token_step) {
    int2 sum =
        sum_partial_pair<G>(slabs + token * G::kPartialStride + 2 * (first_pair + pair), slab_size);
    for (int slot = 0; slot < (1 << p.log2_splits) - 1; ++slot) {
      const int2 addend = *reinterpret_cast<const int2*>(received + slot * part_size +
                                                         2 * (token * my_pairs + pair));
      sum.x += addend.x;
      sum.y += addend.y;
    }
    finish_and_store_pair(p.epilogue, p.epilogue_is_plain, sum, scale, channel,
                          token_begin + token);
  }
}

}  // namespace mma_detail

template <class G>
constexpr int gemm_w4_mma_smem_bytes(int tokens, int chunk_units, int chunk_buffers, int splits) {
  const int buffers = chunk_buffers * tokens * activation_row_bytes(kUnitK * chunk_units);
  const int slabs = G::kKWarps * tokens * G::kPartialStride * 4;
  return mma_detail::kBarrierBytes + mma_detail::received_room(tokens, G::kRows, splits) +
         (buffers > slabs ? buffers : slabs);
}

template <class G>
__global__ void __launch_bounds__(G::kThreads)
    gemm_w4_mma_kernel(const __grid_constant__ GemmW4MmaLaunch p) {
  extern __shared__ __align__(16) unsigned char smem[];
  const int warp = threadIdx.x / 32;
  const int row_warp = warp % G::kRowWarps, k_warp = warp / G::kRowWarps;
  const int tile = p.token_tiles == 1 ? blockIdx.x : blockIdx.x / p.token_tiles;
  const int token_begin = (blockIdx.x - tile * p.token_tiles) * G::kTokens;
  const int tokens = min(p.epilogue.m - token_begin, G::kTokens);

  // This CTA's units of 64 k, and this warp's share of them: k_warp + i kKWarps, i < my_units.
  const int splits = 1 << p.log2_splits, all_units = units_of(p.k);
  const int split_units = (all_units + splits - 1) >> p.log2_splits;
  const int unit_begin = min(static_cast<int>(blockIdx.y) * split_units, all_units);
  const int units = min(split_units, all_units - unit_begin);
  const int my_units = max(0, (units - k_warp + G::kKWarps - 1) / G::kKWarps);

  constexpr int kUnitStep = G::kKWarps * G::kLoads * kVectorsPerBlock;
  // Row tiles past the padded end of the weights repeat the last one; they are never stored.
  const int last_row_tile = (p.epilogue.n + kPackRows - 1) / kPackRows * (kPackRows / 16) - 1;
  uint4 w[G::kStages][G::kRowTiles][G::kLoads] = {};
  const uint4* w_next[G::kRowTiles];  // the unit to load into w[0] next
#pragma unroll
  for (int r = 0; r < G::kRowTiles; ++r) {
    const int row_tile = (tile * G::kRowWarps + row_warp) * G::kRowTiles + r;
    w_next[r] = unit_address<G>(p.weight, min(row_tile, last_row_tile), unit_begin + k_warp, p.k);
  }
  const auto fetch_weights = [&](int stage, bool wanted) {
#pragma unroll
    for (int r = 0; r < G::kRowTiles; ++r)
      load_unit_if<G>(w[stage][r], w_next[r] + stage * kUnitStep, wanted);
  };
  const auto step_weights = [&] {
#pragma unroll
    for (int r = 0; r < G::kRowTiles; ++r) w_next[r] += G::kStages * kUnitStep;
  };

  if (!p.weight_is_constant) grid_dependency_wait();
#pragma unroll
  for (int s = 0; s < G::kStages; ++s) fetch_weights(s, s < my_units);
  step_weights();
  if (p.weight_is_constant) grid_dependency_wait();

  const uint32_t barrier = smem_address(smem);
  int32_t* const received = reinterpret_cast<int32_t*>(smem + mma_detail::kBarrierBytes);
  unsigned char* const buffers =
      smem + mma_detail::kBarrierBytes + mma_detail::received_room(tokens, G::kRows, splits);
  const int x_row_bytes = activation_row_bytes(kUnitK * p.chunk_units);
  const int8_t* x = p.x + token_begin * p.x_row_stride;
  const auto fetch_chunk = [&](int chunk) {
    const int first = chunk * p.chunk_units;
    if (first < units) {
      fetch_activations<G>(smem_address(buffers) + (chunk & 1) * tokens * x_row_bytes, x_row_bytes,
                           x, p.x_row_stride, tokens, kUnitK * (unit_begin + first),
                           kUnitK * min(p.chunk_units, units - first), p.k);
    }
    cp_async_commit();
  };
  fetch_chunk(0);
  if (!p.late_trigger) grid_dependency_launch();
  if (splits > 1) {
    prepare_to_receive(barrier, mma_detail::received_bytes(tokens, G::kRows, splits));
    cluster_arrive_relaxed();
  }
  const int my_pairs = (G::kRows / 2) >> p.log2_splits;  // channel pairs this CTA finishes
  const int channel =
      tile * G::kRows + 2 * (blockIdx.y * my_pairs + (threadIdx.x & (my_pairs - 1)));
  const ScalePair scales = load_scale_pair(p.epilogue, channel);
  uint32_t x_row_offset[G::kTokenTiles];
  activation_row_offsets<G>(x_row_offset, tokens, x_row_bytes);

  int32_t sums[G::kRowTiles][G::kTokenTiles][4] = {};
  const int chunk_iterations = p.chunk_units / G::kKWarps;
  for (int chunk = 0; chunk * p.chunk_units < units; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();  // the chunk has landed for all, and nobody reads the other buffer any more
    fetch_chunk(chunk + 1);
    uint32_t x_group = smem_address(buffers) + (chunk & 1) * tokens * x_row_bytes + kUnitK * k_warp;
    const int first = chunk * chunk_iterations, last = min(first + chunk_iterations, my_units);
    for (int i = first; i < last; i += G::kStages) {
      if (p.late_trigger && i + G::kStages >= my_units) grid_dependency_launch();
      if (i + G::kStages <= last) {  // no branches: units may overlap
#pragma unroll
        for (int s = 0; s < G::kStages; ++s) {
          multiply_unit<G>(sums, w[s], x_group + kUnitK * G::kKWarps * s, x_row_offset);
          fetch_weights(s, i + s + G::kStages < my_units);
        }
      } else {  // the last units of this warp
#pragma unroll
        for (int s = 0; s < G::kStages; ++s) {
          if (i + s < last)
            multiply_unit<G>(sums, w[s], x_group + kUnitK * G::kKWarps * s, x_row_offset);
        }
      }
      step_weights();
      x_group += kUnitK * G::kKWarps * G::kStages;
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // the partial sums take the place of the activations
  int32_t* const slabs = reinterpret_cast<int32_t*>(buffers);
  store_partial_sums<G>(slabs + k_warp * tokens * G::kPartialStride, sums, tokens, row_warp);
  mma_detail::finish_tile<G>(p, slabs, received, barrier, tokens, token_begin, channel, scales);
}

}  // namespace prefixquant
