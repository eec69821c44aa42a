// SPDX-License-Identifier: Apache-2.0
// Sizes of the streaming GEMV (gemm_w4_stream.cuh) that its kernel, its launcher and its config
// choice share. Needs no CUDA beyond the qualifiers.
#pragma once

#include "prefixquant/layout_w4.h"

namespace prefixquant {

inline constexpr int kStreamStageK = kPackK;         // k of one stage of the ring
inline constexpr int kStreamGroups = 2;              // groups of four warps, taking stages in turn
inline constexpr int kStreamCtasPerSm = 4;           // what registers allow: 9 warps of 56 each
inline constexpr int kStreamSmemLimit = 227 * 1024;  // what a block can have from sm_90 on

PQ_HOST_DEVICE constexpr int stream_stage_bytes(int weight_bits) {
  return kPackRows * kStreamStageK * weight_bits / 8;
}

PQ_HOST_DEVICE constexpr int stream_stages_of(int k) {
  return (k + kStreamStageK - 1) / kStreamStageK;
}

PQ_HOST_DEVICE constexpr int stream_split_stages(int k, int splits) {
  return (stream_stages_of(k) + splits - 1) / splits;
}

// A slot that is used again must belong to one group of warps alone: two groups that shared it
// could not tell its rounds apart by the one bit of parity that they wait for.
PQ_HOST_DEVICE constexpr bool is_stream_ring(int slots, int split_stages) {
  return slots >= 2 && (slots % kStreamGroups == 0 || slots >= split_stages);
}

// Byte offsets in shared memory.
struct StreamSmem {
  int ring_barriers;
  int received;  // partial sums of the other splits, `received_bytes` of them
  int received_bytes;
  int ring;
  int x;
  int x_row_bytes;
  int total;
};

PQ_HOST_DEVICE constexpr StreamSmem plan_stream_smem(int weight_bits, int tokens, int k, int splits,
                                                     int ring_stages) {
  StreamSmem at = {};
  at.ring_barriers = 16;  // after the mbarrier of the splits
  at.received = at.ring_barriers + 16 * ring_stages;
  at.received_bytes = (splits - 1) * tokens * (kPackRows / splits) * 4;
  at.ring = (at.received + at.received_bytes + 127) / 128 * 128;
  // The partial sums take the place of the ring in the end; 4 words a token against conflicts.
  const int ring = ring_stages * stream_stage_bytes(weight_bits);
  const int slabs = kStreamGroups * tokens * (kPackRows + 4) * 4;
  at.x = at.ring + (ring > slabs ? ring : slabs);
  at.x_row_bytes = kStreamStageK * stream_split_stages(k, splits) + 16;
  at.total = at.x + tokens * at.x_row_bytes;
  return at;
}

}  // namespace prefixquant
