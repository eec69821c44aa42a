// SPDX-License-Identifier: Apache-2.0
//
// The first two phases of the kernel of hadamard_cluster.cuh: tiles of a block to the CTAs that own
// their columns, and the table of the signed sums of four.
#pragma once

#include "prefixquant/cp_async.cuh"
#include "prefixquant/hadamard_exchange.cuh"
#include "prefixquant/hadamard_integer.cuh"
#include "prefixquant/hadamard_row_args.h"
#include "prefixquant/hadamard_tile.cuh"
#include "prefixquant/quantizer.cuh"

namespace prefixquant {

inline constexpr int kHadamardTile = 256;  // elements that a warp transforms at a time

struct HadamardClusterArgs : HadamardRowArgs {
  int k;
  int pow2;
  int log2_width;
  int log2_owned;  // columns that a CTA owns: width / cluster
  int log2_rows;   // k = 1: of q
  int log2_cluster;
  FastDivisor pick_vectors;  // four picks each, of an output
  HadamardClusterSmem smem;
};

// By name, so that the accesses stay shared-memory accesses.
__device__ __forceinline__ float* hadamard_cluster_smem() {
  extern __shared__ float4 cluster_smem[];
  return reinterpret_cast<float*>(cluster_smem);
}

// ---- 1: tiles ----

// One vector of 8 elements a lane, as it lies in memory.
struct GateUp {
  uint4 x, up;

  __device__ __forceinline__ void load(const HadamardClusterArgs& p, int64_t x_at, int64_t up_at,
                                       uint32_t vector, bool wanted) {
    x = up = make_uint4(0, 0, 0, 0);
    if (!wanted) return;
    x = *reinterpret_cast<const uint4*>(p.x + x_at + 8 * vector);
    if (p.up) up = *reinterpret_cast<const uint4*>(p.up + up_at + 8 * vector);
  }
  // float32(x), or silu(x) * up
  __device__ __forceinline__ void values(const HadamardClusterArgs& p, float (&v)[8]) const {
    to_floats(x, p.is_bfloat16, v);
    if (!p.up) return;
    float u[8];
    to_floats(up, p.is_bfloat16, u);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(silu_approximate(v[e]), u[e]);
  }
};

// Distance 8 * lanes elements, between lanes; see hadamard_tile.cuh for the rounding.
template <int kCount>
__device__ __forceinline__ void butterflies_between_lanes(float (&v)[kCount], int lanes, int lane) {
  const float sign = lane & lanes ? -1.0f : 1.0f;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    v[e] = __fmaf_rn(v[e], sign, __shfl_xor_sync(0xFFFFFFFFu, v[e], lanes));
  }
}

// Sends 8 columns of a row to their owner.
__device__ __forceinline__ void send_vector(const HadamardClusterArgs& p, const float (&v)[8],
                                            uint32_t vector, uint32_t received) {
  const uint32_t row = 8 * vector >> p.log2_width;
  const uint32_t column = 8 * vector & ((1u << p.log2_width) - 1);
  const uint32_t owner = column >> p.log2_owned;
  const uint32_t there = row * p.smem.row_stride + (row >> p.smem.log2_group_rows) * p.smem.pad +
                         (column & ((1u << p.log2_owned) - 1));
  float* const local = hadamard_cluster_smem() + there;
  const float4 low = make_float4(v[0], v[1], v[2], v[3]);
  const float4 high = make_float4(v[4], v[5], v[6], v[7]);
  if (p.log2_cluster > 0) {
    const uint32_t remote = address_in_rank(smem_address(local), owner);
    const uint32_t barrier = address_in_rank(received, owner);
    send_to_cluster(remote, low, barrier);
    send_to_cluster(remote + 16, high, barrier);
  } else {
    reinterpret_cast<float4*>(local)[0] = low;
    reinterpret_cast<float4*>(local)[1] = high;
  }
}

// `raw` holds this warp's first tile. Tiles are dealt to CTAs in turn. kMaximum: returns the
// largest magnitude of this lane's results.
template <bool kMaximum>
__device__ __forceinline__ float transform_tiles(const HadamardClusterArgs& p, GateUp raw,
                                                 int64_t x_at, int64_t up_at, uint32_t tile,
                                                 uint32_t received) {
  float largest = 0.0f;
  const int lane = threadIdx.x % 32;
  const uint32_t vectors = p.block_size / 8;
  const uint32_t step = (blockDim.x / 32) << p.log2_cluster;
#pragma unroll 1
  while (32 * tile < vectors) {
    float v[8];
    raw.values(p, v);
    butterflies_in_vector<1>(v);
    butterflies_in_vector<2>(v);
    butterflies_in_vector<4>(v);
#pragma unroll 1
    for (int lanes = 1; lanes < 1 << (p.log2_width - 3); lanes *= 2) {
      butterflies_between_lanes(v, lanes, lane);
    }
    if constexpr (kMaximum) {
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = larger_magnitude(largest, v[e]);
    }
    const uint32_t vector = 32 * tile + lane;
    if (vector < vectors) send_vector(p, v, vector, received);
    tile += step;
    raw.load(p, x_at, up_at, 32 * tile + lane, 32 * tile + lane < vectors);
  }
  return largest;
}

// ---- 2: sums of four ----

// Entry (i, g) of the picks: byte offset in the table of the sum of group g that output i adds, its
// sign in bit 15. Sum s has the signs (+, s & 1, s & 2, s & 4) of inputs 4 g .. 4 g + 3.
__device__ __forceinline__ uint32_t pick_of(uint32_t four_signs, uint32_t sum_bytes) {
  const uint32_t minus = four_signs >> 7 & 0x01010101u;
  const uint32_t first = minus & 1;
  const uint32_t others = (minus ^ first * 0x01010100u) >> 8;
  const uint32_t sum = others * ((1u << 16) | (1u << 9) | (1u << 2)) >> 16 & 7;
  return sum * sum_bytes | first << 15;
}

__device__ __forceinline__ void make_picks(const HadamardClusterArgs& p, uint32_t sum_bytes) {
  char* const picks = reinterpret_cast<char*>(hadamard_cluster_smem()) + p.smem.picks_at;
  const uint32_t vectors = p.pick_vectors.divisor;
#pragma unroll 1
  for (uint32_t task = threadIdx.x; task < p.k * vectors; task += blockDim.x) {
    const uint32_t row = p.pick_vectors.divide(task), first = 4 * (task - row * vectors);
    const auto* signs = reinterpret_cast<const uint32_t*>(p.signs + row * p.k) + first;
    uint32_t words[4], picked[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) words[b] = 4 * (first + b) < p.k ? __ldg(signs + b) : 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) picked[b] = pick_of(words[b], sum_bytes);
    reinterpret_cast<uint2*>(picks)[task] =
        make_uint2(picked[0] | picked[1] << 16, picked[2] | picked[3] << 16);
  }
}

// The eight sums of a column of four rows.
__device__ __forceinline__ void store_sums(const float (&x)[4], float* to, uint32_t sum_stride) {
  const float low[2] = {__fadd_rn(x[0], x[1]), __fsub_rn(x[0], x[1])};
  const float high[2] = {__fadd_rn(x[2], x[3]), __fsub_rn(x[2], x[3])};
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    // Signs of the third and fourth input: ++, -+, +-, --.
    const float l = low[s & 1], h = high[(s >> 1 & 1) ^ (s >> 2)];
    to[s * sum_stride] = s & 2 ? __fsub_rn(l, h) : __fadd_rn(l, h);
  }
}

// Butterflies of distance 256 and 512 of a row of k: output `part` of its Q parts.
template <int Q>
__device__ __forceinline__ float butterfly_part(const float (&x)[Q], uint32_t part) {
  if constexpr (Q == 1) {
    return x[0];
  } else {
    const float sign = part & 1 ? -1.0f : 1.0f;  // fma(b, -1, a) is a - b
    const float near = __fmaf_rn(x[1], sign, x[0]);
    if constexpr (Q == 2) return near;
    return __fmaf_rn(__fmaf_rn(x[Q - 1], sign, x[Q - 2]), part & 2 ? -1.0f : 1.0f, near);
  }
}

// A thread makes the sums of one part: with all Q parts of a column to itself it would store for
// longer than reading the column Q times takes.
template <int Q>
__device__ __forceinline__ void make_sums(const HadamardClusterArgs& p) {
  constexpr uint32_t kLog2Q = Q == 4 ? 2 : Q / 2;
  const uint32_t owned = 1u << p.log2_owned, log2_columns = p.log2_owned + kLog2Q;
  const uint32_t tasks = p.k / 4 << log2_columns;
  const uint32_t x_group = 4 * Q * owned + p.smem.pad, table_group = 8 * Q * owned + p.smem.pad;
#pragma unroll 1
  for (uint32_t task = threadIdx.x; task < tasks; task += blockDim.x) {
    const uint32_t group = task >> log2_columns, in_group = task & ((1u << log2_columns) - 1);
    const uint32_t part = in_group >> p.log2_owned, column = in_group & (owned - 1);
    const float* from = hadamard_cluster_smem() + group * x_group + column;
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float parts[Q];
#pragma unroll
      for (int q = 0; q < Q; ++q) parts[q] = from[(j * Q + q) * owned];
      x[j] = butterfly_part<Q>(parts, part);
    }
    float* to = hadamard_cluster_smem() + p.smem.table_at / 4 + group * table_group + in_group;
    store_sums(x, to, Q * owned);
  }
}

}  // namespace prefixquant
