// SPDX-License-Identifier: Apache-2.0
//
// Config choice of the streaming GEMV: k splits, the size of the ring, and when the next launch may
// start. Pure arithmetic: needs no CUDA.
//
// From a sweep on an H100 (132 SMs) over 15 layer shapes, M = 1, 2, 4, 8, splits 1 to 8 and rings
// of 32 to 96 KB. The register ring (gemm_w4_mma.cuh, its own choice) and this kernel by the table
// below, microseconds, one later run, M = 1:
//                    int4          int8                         int4          int8
//   3584 x 3584      4.04  3.50     7.25  5.25   10240 x 8192   15.37 14.18   30.87 27.68
//   3584 x 18944    15.67 11.92    23.75 22.52   12288 x 4096   10.17  8.55   18.95 16.74
//   4096 x 4096      4.27  4.29     8.61  6.16   22016 x 4096   16.14 14.95   32.02 29.63
//   4096 x 11008    10.86  8.43    16.86 15.17   28672 x 4096   20.55 19.38   39.43 38.62
//   4096 x 14336    11.62 10.44    21.60 19.76   37888 x 3584   25.41 22.92   46.51 44.13
//   6144 x 4096      5.98  5.05    10.30  8.58   57344 x 8192   76.23 77.11     -     -
//   8192 x 8192     12.44 11.60    22.98 21.56    8192 x 28672  39.94 38.28   77.92 76.12
// When the next launch starts matters as much: 4096 x 14336 10.39 late and 11.01 at once,
// 12288 x 4096 8.99 and 8.48.
// From two tokens on, int4, the activations that every CTA reads first cost about what the ring
// gains: it wins where rows are few and k is long (4096 x 14336: 12.2 -> 10.5 us at M = 2) and
// where the register ring has no good geometry.
#include <algorithm>
#include <cmath>

#include "prefixquant/gemm_w4.h"
#include "prefixquant/gemm_w4_stream_plan.h"

namespace prefixquant {
namespace {

struct Choice {
  int splits;   // 0: leave the shape to the other kernels
  int ring_kb;  // of a CTA
  bool late;    // the next launch may start when the last loads have left, else at once
};
constexpr Choice kNone = {0, 0, false};

// The best choice for each measured shape: one token, and the least mean over 2 to 8.
struct Measured {
  int n, k;
  Choice w4_one, w4_few, w8_one, w8_few;
};
constexpr int kMeasuredSms = 132;
constexpr Measured kMeasured[] = {
    {3584, 3584, {2, 96, true}, {2, 96, true}, {2, 96, true}, {2, 64, true}},
    {3584, 18944, {8, 48, true}, {8, 32, false}, {4, 96, true}, {4, 64, false}},
    {4096, 4096, {2, 48, true}, {2, 96, false}, {4, 96, true}, {4, 96, false}},
    {4096, 11008, {4, 64, false}, {2, 96, true}, {8, 48, false}, {2, 96, false}},
    {4096, 14336, {4, 64, true}, {2, 64, true}, {8, 48, false}, {2, 96, true}},
    {4608, 3584, {2, 96, false}, {2, 96, false}, {4, 64, false}, {4, 96, true}},
    {6144, 4096, {1, 96, true}, {2, 96, false}, {2, 96, true}, {4, 32, true}},
    {8192, 8192, {2, 96, false}, {2, 64, true}, {2, 96, true}, {2, 64, true}},
    {8192, 28672, {2, 96, true}, kNone, {4, 96, true}, {8, 64, false}},
    {10240, 8192, {2, 64, true}, kNone, {4, 64, true}, {8, 32, false}},
    {12288, 4096, {1, 96, false}, {2, 32, true}, {2, 64, true}, {2, 48, true}},
    {22016, 4096, {1, 64, false}, {2, 32, true}, {2, 64, false}, {4, 32, false}},
    {28672, 4096, {1, 96, false}, kNone, {2, 32, false}, {4, 32, false}},
    {37888, 3584, {1, 64, false}, {1, 64, false}, {2, 64, true}, {4, 32, false}},
    {57344, 8192, kNone, kNone, {2, 96, false}, {2, 64, true}},
};

int div_up(int a, int b) { return (a + b - 1) / b; }

// The slots of a ring of at most `ring_kb`, no more than a split has stages, valid by
// is_stream_ring(); 0 where not two fit.
int ring_stages_of(const GemmW4Shape& shape, const Choice& choice) {
  const int fitting = choice.ring_kb * 1024 / stream_stage_bytes(shape.weight_bits);
  const int of_split = std::max(2, stream_split_stages(shape.k, choice.splits));
  for (int stages = std::min(fitting, of_split); stages >= 2; --stages) {
    if (!is_stream_ring(stages, of_split)) continue;
    const StreamSmem smem =
        plan_stream_smem(shape.weight_bits, shape.m, shape.k, choice.splits, stages);
    if (smem.total <= kStreamSmemLimit) return stages;
  }
  return 0;
}

// CTAs that an SM holds; 1 KB of shared memory a CTA is the system's.
int ctas_per_sm_of(const StreamSmem& smem) {
  return std::min(kStreamCtasPerSm, kStreamSmemLimit / (smem.total + 1024));
}

// What a choice loses, by what the sweep showed: too little in flight on an SM, the tail of a last
// wave, the exchange between splits. Choosing by it is 3 % (int8: 4 %) above the best, M = 1.
float estimate_loss(const GemmW4Shape& shape, const Choice& choice, int sm_count) {
  const int stages = ring_stages_of(shape, choice);
  if (stages == 0) return 1e9f;
  const StreamSmem smem =
      plan_stream_smem(shape.weight_bits, shape.m, shape.k, choice.splits, stages);
  const float ctas_per_sm =
      static_cast<float>(div_up(shape.n, kPackRows) * choice.splits) / static_cast<float>(sm_count);
  const float stage_kb = static_cast<float>(stream_stage_bytes(shape.weight_bits)) / 1024.0f;
  const float in_flight_kb = ctas_per_sm * static_cast<float>(stages) * stage_kb;
  const float weights_kb =
      ctas_per_sm * stage_kb * static_cast<float>(stream_split_stages(shape.k, choice.splits));
  const float wanted_kb = std::min(110.0f, 0.6f * weights_kb);
  float loss = 0.2f * std::max(0.0f, 1.0f - in_flight_kb / wanted_kb) +
               0.02f * std::log2(static_cast<float>(choice.splits));
  // SMs without work: 5120 x 5120 in 80 CTAs took 6.7 us, the register ring 6.1.
  loss += std::max(0.0f, 0.7f - ctas_per_sm);
  const float waves = ctas_per_sm / static_cast<float>(ctas_per_sm_of(smem));
  if (waves > 1.0f) loss += 0.4f * (std::ceil(waves) / waves - 1.0f) + 0.08f / waves;
  return loss;
}

Choice choose_by_estimate(const GemmW4Shape& shape, int sm_count) {
  const bool few_rows_long_k = div_up(shape.n, kPackRows) <= sm_count && shape.k >= 8192;
  if (shape.m > 1 && shape.weight_bits == 4 && !few_rows_long_k) return kNone;
  Choice best = {1, 32, true};
  float least = 1e9f;
  for (const int splits : {1, 2, 4, 8}) {
    if (splits > 1 && stream_split_stages(shape.k, splits) < kStreamGroups) break;
    for (const int ring_kb : {32, 48, 64, 96}) {
      const Choice choice = {splits, ring_kb, true};
      const float loss = estimate_loss(shape, choice, sm_count);
      if (loss < least) least = loss, best = choice;
    }
  }
  // Where one wave of CTAs leaves room for the next launch, that launch should start late enough to
  // have loads under way in the gap after this one. Where CTAs come in several waves, at once.
  const int stages = ring_stages_of(shape, best);
  const StreamSmem smem =
      plan_stream_smem(shape.weight_bits, shape.m, shape.k, best.splits, stages);
  best.late = div_up(shape.n, kPackRows) * best.splits <= ctas_per_sm_of(smem) * sm_count;
  return best;
}

Choice choose(const GemmW4Shape& shape, int sm_count) {
  for (const Measured& entry : kMeasured) {
    if (entry.n != shape.n || entry.k != shape.k || sm_count != kMeasuredSms) continue;
    if (shape.weight_bits == 4) return shape.m == 1 ? entry.w4_one : entry.w4_few;
    return shape.m == 1 ? entry.w8_one : entry.w8_few;
  }
  return choose_by_estimate(shape, sm_count);
}

}  // namespace

GemmW4Config choose_gemm_w4_stream_config(const GemmW4Shape& shape, int sm_count) {
  GemmW4Config config;
  config.kernel = GemmW4Kernel::kGemvStream;
  config.block_rows = kPackRows;
  config.block_tokens = kGemvStreamTokens;
  config.stages = 0;
  config.cluster = 1;
  if (shape.n <= 0 || shape.k <= 0 || shape.m <= 0 || shape.m > kGemvStreamTokens) return config;
  const Choice choice = choose(shape, sm_count);
  if (choice.splits == 0) return config;
  config.stages = ring_stages_of(shape, choice);
  config.release_stages = choice.late ? config.stages : 0;
  config.split_k = choice.splits;
  config.cluster = choice.splits;
  config.grid = div_up(shape.n, kPackRows) * choice.splits;
  return config;
}

}  // namespace prefixquant
