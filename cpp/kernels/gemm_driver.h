// SPDX-License-Identifier: Apache-2.0
// The loops around the micro-kernel: row sums of x, the split of the output among threads, and the
// walk of one thread over its part.
//
// The output is cut into row blocks (x of a row block stays in L2) and these into units of 16 or 32
// outputs. Units are numbered row block by row block and every thread takes one contiguous run of
// them, so a thread reads the same weights at every call and finds them in its own L2.
#pragma once

#include <omp.h>

#include "../gemm_params.h"
#include "gemm_dot_tile.h"
#include "gemm_epilogue.h"
#include "isa_namespace.h"

#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#endif

PQ_ISA_NAMESPACE_BEGIN

// Half of a 2 MB L2; the other half is for the weights passing by.
constexpr int64_t kRowBlockBytes = 1 << 20;
// Below this many multiplies the work is shorter than waking the other threads (2 to 10 us).
constexpr int64_t kSerialMultiplies = 1 << 18;
constexpr int kNarrowRows = 4;  // up to here four blocks of outputs fit the accumulators

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int32_t sum_row(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  int64_t j = 0;
#if defined(__AVX512VNNI__)
  __m512i sums = _mm512_setzero_si512();
  for (; j + 64 <= count; j += 64) {
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(x + j));
  }
  sum = _mm512_reduce_add_epi32(sums);
#endif
  for (; j < count; ++j) sum += x[j];
  return sum;
}

// Fills row_sum and x_tail for rows [m0, m1).
static void prepare_rows(const GemmParams& p, int64_t m0, int64_t m1) {
  const int64_t tail_start = p.k / kPadInputs * kPadInputs;
  for (int64_t i = m0; i < m1; ++i) {
    const int8_t* x = p.x + i * p.k;
    p.row_sum[i] = sum_row(x, p.k);
    if (tail_start == p.k) continue;
    int8_t* tail = p.x_tail + i * kPadInputs;
    for (int64_t j = 0; j < kPadInputs; ++j) tail[j] = tail_start + j < p.k ? x[tail_start + j] : 0;
  }
}

template <class Weight, int NB>
static void dot_tile_rows(int64_t count, const RowTile& rows, const uint8_t* weight,
                          int64_t block_bytes, int32_t* acc) {
  switch (count) {
#define PQ_CASE(MR)                                                 \
  case MR:                                                          \
    if constexpr (MR <= kMaxRows && (NB <= 2 || MR <= kNarrowRows)) \
      dot_tile<Weight, MR, NB>(rows, weight, block_bytes, acc);     \
    return;
    PQ_CASE(1)
    PQ_CASE(2)
    PQ_CASE(3)
    PQ_CASE(4)
    PQ_CASE(5) PQ_CASE(6) PQ_CASE(7) PQ_CASE(8) PQ_CASE(9) PQ_CASE(10) PQ_CASE(11) PQ_CASE(12)
#undef PQ_CASE
  }
}

// Rows [m0, m1) of `blocks` (1, 2 or 4) blocks of outputs from block `block0` on.
template <class Weight>
static void compute_rows(const GemmParams& p, int64_t m0, int64_t m1, int64_t block0,
                         int64_t blocks) {
  const int64_t block_bytes =
      ceil_div(p.k, kPadInputs) * (kPadInputs / kGroupInputs) * Weight::kGroupBytes;
  const uint8_t* weight = p.weight + block0 * block_bytes;
  const int64_t n0 = block0 * kBlockOutputs;
  alignas(64) float factor_storage[2 * 4 * kBlockOutputs];
  const OutputFactors factors = load_factors(p, n0, blocks * kBlockOutputs, factor_storage);
  FinishTile* finish = pick_finish_tile(p.output_dtype);
  const int64_t groups = p.k / kGroupInputs;

  alignas(64) int32_t acc[kMaxRows * 32 > kNarrowRows * 64 ? kMaxRows * 32 : kNarrowRows * 64];
  for (int64_t i = m0; i < m1; i += kMaxRows) {
    const int64_t count = smaller(kMaxRows, m1 - i);
    RowTile rows{p.x + i * p.k, p.k, groups, nullptr};
    if (p.k % kGroupInputs) {
      rows.tail = p.x_tail + i * kPadInputs + groups * kGroupInputs % kPadInputs;
    }
    switch (blocks) {
      case 1:
        dot_tile_rows<Weight, 1>(count, rows, weight, block_bytes, acc);
        break;
      case 2:
        dot_tile_rows<Weight, 2>(count, rows, weight, block_bytes, acc);
        break;
      default:
        dot_tile_rows<Weight, 4>(count, rows, weight, block_bytes, acc);
        break;
    }
    finish(p, factors, Weight::kOffset, acc, blocks * kBlockOutputs, count, blocks, i, n0);
  }
}

// The units [first, last) of the numbering above.
struct Partition {
  int64_t row_block;      // rows of a row block
  int64_t unit_blocks;    // blocks of 16 outputs in a unit
  int64_t units_per_row;  // units in a row block
  int64_t units;
};

static Partition partition_output(const GemmParams& p, int64_t threads) {
  Partition part;
  const int64_t n_blocks = ceil_div(p.n, kBlockOutputs);
  part.unit_blocks = p.m <= kNarrowRows ? 1 : 2;
  part.units_per_row = ceil_div(n_blocks, part.unit_blocks);
  int64_t row_blocks = ceil_div(p.m * p.k, kRowBlockBytes);
#if defined(__AMX_INT8__)
  row_blocks = 1;  // here the weights stay in L2 and x passes by
#endif
  // Few outputs and many threads: cut the rows too, down to 96, until each thread has four units.
  const int64_t wanted = ceil_div(4 * threads, part.units_per_row);
  const int64_t possible = ceil_div(p.m, 96);
  if (row_blocks < smaller(wanted, possible)) row_blocks = smaller(wanted, possible);
  // A multiple of both 12 and 32 rows keeps the tiles of either kernel whole.
  part.row_block = ceil_div(ceil_div(p.m, row_blocks), 96) * 96;
  if (part.row_block > p.m) part.row_block = p.m;
  part.units = ceil_div(p.m, part.row_block) * part.units_per_row;
  return part;
}

template <class Weight>
static void compute_units(const GemmParams& p, const Partition& part, int64_t first, int64_t last) {
  const int64_t n_blocks = ceil_div(p.n, kBlockOutputs);
  for (int64_t unit = first; unit < last;) {
    const int64_t row_block = unit / part.units_per_row;
    const int64_t column = unit % part.units_per_row;
    const int64_t m0 = row_block * part.row_block;
    const int64_t m1 = smaller(m0 + part.row_block, p.m);
    const int64_t block0 = column * part.unit_blocks;
    const int64_t run = smaller(last - unit, part.units_per_row - column);
    int64_t blocks = smaller(run * part.unit_blocks, n_blocks - block0);
#if defined(__AMX_INT8__)
    if (m1 - m0 >= kAmxMinRows) {
      compute_rows_amx<Weight>(p, m0, m1, block0, blocks);
      unit += run;
      continue;
    }
#endif
    const int64_t most = part.unit_blocks == 1 ? 4 : 2;
    if (blocks > most) blocks = most;
    if (blocks == 3) blocks = 2;
    compute_rows<Weight>(p, m0, m1, block0, blocks);
    unit += ceil_div(blocks, part.unit_blocks);
  }
}

template <class Weight>
static void gemm(const GemmParams& p) {
  if (p.m == 0 || p.n == 0) return;
  const bool parallel = p.m * p.n * p.k >= kSerialMultiplies;
  const int threads = parallel ? p.max_threads : 1;
  const Partition part = partition_output(p, threads);
  if (threads == 1 || part.units == 1) {
    prepare_rows(p, 0, p.m);
    compute_units<Weight>(p, part, 0, part.units);
    return;
  }
  // Up to here the sums take one thread some 10 us; a barrier may cost more, above all when the
  // cores are shared with others.
  const bool few_rows = p.m * p.k <= 1 << 20;
  if (few_rows) prepare_rows(p, 0, p.m);
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads();
    const int64_t id = omp_get_thread_num();
    if (!few_rows) {
      prepare_rows(p, p.m * id / team, p.m * (id + 1) / team);
#pragma omp barrier
    }
    compute_units<Weight>(p, part, part.units * id / team, part.units * (id + 1) / team);
  }
}

// The part of thread `id` of `team` in a product of few rows (one row block), for callers that have
// a parallel region of their own; row_sum and x_tail belong to the calling thread.
template <class Weight>
static OutputRange gemm_share(const GemmParams& p, int64_t id, int64_t team) {
  const Partition part = partition_output(p, team);
  const int64_t first = part.units * id / team, last = part.units * (id + 1) / team;
  prepare_rows(p, 0, p.m);
  compute_units<Weight>(p, part, first, last);
  const int64_t unit_outputs = part.unit_blocks * kBlockOutputs;
  return {smaller(first * unit_outputs, p.n), smaller(last * unit_outputs, p.n)};
}

PQ_ISA_NAMESPACE_END
