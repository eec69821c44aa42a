// SPDX-License-Identifier: Apache-2.0
// Attention of queries over [16-bit prefix | quantized cache], reading the packed cache directly.
//
// Computes, for one KV head and its `group` query heads, in float32:
//   s[r, j] = scaling * (q[r] . prefix_k[j])              prefix, always attended
//   s[r, j] = scaling * k_scale * (q[r] . k[j])           cache, where the mask allows
//   out[r]  = sum_j softmax(s)[r, j] * (prefix_v[j] or v_scale * v[j])
// The scales touch logits and probabilities only; cached values stay the small integers they are.
//
// A row r is one (token, query head of the group); a task is one KV head of one sequence and up to
// kMaxRows of its rows. It walks the keys in blocks of kBlock tokens: unpack K transposed and V
// into float panels that stay in L1/L2, then scores, online softmax, weighted sum. A block is
// unpacked once for all rows of the task. The panels are kv_panels.h's.
#include <omp.h>

#include <type_traits>

#include "exp.h"
#include "kv_panels.h"
#include "quantize.h"

PQ_ISA_NAMESPACE_BEGIN

// exp(x) for x <= 0, zero below -87: a masked logit must not pay for subnormal arithmetic.
PQ_INLINE FloatV exp_negative(FloatV x) {
  const FloatV e = exp_lanes(x > -87.0f ? x : broadcast(-87.0f));
  return x > -87.0f ? e : FloatV{};
}

// ---- arithmetic on the panels ----

// score[r, 0 .. kBlock) = factor * (q[r] . K) for ROWS rows.
template <int ROWS>
static void score_rows(const Workspace& w, int64_t row0, int64_t dim, float factor) {
  FloatV sum[ROWS][kBlockVectors] = {};
  const float* q = w.q + row0 * dim;
  for (int64_t d = 0; d < dim; ++d) {
    for (int i = 0; i < kBlockVectors; ++i) {
      const FloatV k = load<FloatV>(w.k_panel + d * kBlock + i * kLanes);
      for (int r = 0; r < ROWS; ++r) sum[r][i] += k * q[r * dim + d];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int i = 0; i < kBlockVectors; ++i) {
      store(w.score + (row0 + r) * kBlock + i * kLanes, sum[r][i] * factor);
    }
  }
}

// out[r] += sum_t score[r, t] * V[t] for ROWS rows.
template <int ROWS>
static void accumulate_rows(const Workspace& w, int64_t row0, int64_t count) {
  for (int64_t c = 0; c < w.width; c += kLanes) {
    FloatV sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = load<FloatV>(w.out + (row0 + r) * w.width + c);
    for (int64_t t = 0; t < count; ++t) {
      const FloatV v = load<FloatV>(w.v_panel + t * w.width + c);
      for (int r = 0; r < ROWS; ++r) sum[r] += v * w.score[(row0 + r) * kBlock + t];
    }
    for (int r = 0; r < ROWS; ++r) store(w.out + (row0 + r) * w.width + c, sum[r]);
  }
}

// Logits of one row and block -> probabilities relative to the row's running maximum, times
// v_scale. Entries that are not attended are -inf on entry and 0 on return.
PQ_INLINE void softmax_block(Workspace& w, int64_t row, float v_scale) {
  float* score = w.score + row * kBlock;
  float top = w.top[row];
  for (int64_t t = 0; t < kBlock; ++t) top = score[t] > top ? score[t] : top;
  if (top == kMinusInfinity) {  // nothing attended yet: exp(-inf - -inf) would be NaN
    for (int64_t t = 0; t < kBlock; ++t) score[t] = 0.0f;
    return;
  }
  if (top > w.top[row]) {
    const float shrink = exp_negative(broadcast(w.top[row] - top))[0];
    w.total[row] *= shrink;
    float* out = w.out + row * w.width;
    for (int64_t c = 0; c < w.width; c += kLanes) store(out + c, load<FloatV>(out + c) * shrink);
    w.top[row] = top;
  }
  FloatV sum = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const FloatV p = exp_negative(load<FloatV>(score + i) - top);
    sum += p;
    store(score + i, p * v_scale);
  }
  for (int i = 0; i < kLanes; ++i) w.total[row] += sum[i];
}

static void attend_block(Workspace& w, int64_t rows, int64_t count, float v_scale) {
  for (int64_t r = 0; r < rows; ++r) softmax_block(w, r, v_scale);
  for (int64_t r = 0; r < rows; r += kTileRows) {
    switch (rows - r) {
      case 1:
        accumulate_rows<1>(w, r, count);
        break;
      case 2:
        accumulate_rows<2>(w, r, count);
        break;
      case 3:
        accumulate_rows<3>(w, r, count);
        break;
      default:
        accumulate_rows<kTileRows>(w, r, count);
        break;
    }
  }
}

static void score_block(Workspace& w, int64_t rows, int64_t dim, float factor) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    switch (rows - r) {
      case 1:
        score_rows<1>(w, r, dim, factor);
        break;
      case 2:
        score_rows<2>(w, r, dim, factor);
        break;
      case 3:
        score_rows<3>(w, r, dim, factor);
        break;
      default:
        score_rows<kTileRows>(w, r, dim, factor);
        break;
    }
  }
}

// ---- one task ----

// Keys of sequence `batch`.
PQ_INLINE int64_t cached_keys(const KvAttentionParams& p, int64_t batch) {
  return p.lengths ? p.lengths[batch] : p.cached;
}

// `count` rows of the cache from key `first` on, all in one page.
struct KeyBlock {
  int64_t first;
  int64_t count;
  int64_t page;
  int64_t offset;  // in the page

  KeyBlock(const KvAttentionParams& p, int64_t batch, int64_t first_key, int64_t end)
      : first(first_key),
        count(end - first_key < kBlock ? end - first_key : kBlock),
        page(p.first_page + batch),
        offset(first_key) {
    if (!p.block_table) return;
    page = p.block_table[batch * p.block_table_stride + first / p.page_size];
    offset = first % p.page_size;
    if (count > p.page_size - offset) count = p.page_size - offset;
  }

  int64_t at(const int64_t (&strides)[3], int64_t head) const {
    return page * strides[0] + head * strides[1] + offset * strides[2];
  }
};

template <int BITS>
PQ_INLINE void unpack_keys(const KvAttentionParams& p, const KeyBlock& b, int64_t head,
                           Workspace& w) {
  const int64_t at = b.at(p.k_strides, head);
  if constexpr (BITS == 16) {
    with_float_type(p.cache_type, p.k, [&](const auto* k) {
      unpack_float_k(k + at, p.k_strides[2], b.count, p.dim, w);
    });
  } else {
    unpack_k<BITS>(static_cast<const uint8_t*>(p.k) + at, p.k_strides[2], b.count, p.dim, w);
  }
}

template <int BITS>
PQ_INLINE void unpack_values(const KvAttentionParams& p, const KeyBlock& b, int64_t head,
                             Workspace& w) {
  const int64_t at = b.at(p.v_strides, head);
  if constexpr (BITS == 16) {
    with_float_type(p.cache_type, p.v, [&](const auto* v) {
      unpack_float_v(v + at, p.v_strides[2], b.count, p.dim, w);
    });
  } else {
    unpack_v<BITS>(static_cast<const uint8_t*>(p.v) + at, p.v_strides[2], b.count, p.dim, w);
  }
}

// Sets the logits of keys [first, first + count) that row (batch, token) may not attend to -inf,
// and those past the end. Returns whether any may be attended.
static bool apply_mask(const KvAttentionParams& p, int64_t batch, int64_t token, const KeyBlock& b,
                       float* score) {
  bool any = false;
  // Causal, aligned to the lower right: the last token sees the whole cache.
  const int64_t cached = cached_keys(p, batch);
  const int64_t last = p.mask ? cached : cached - p.tokens + token + 1;
  const uint8_t* mask = p.mask ? p.mask + batch * p.mask_strides[0] + token * p.mask_strides[1] +
                                     b.first * p.mask_strides[2]
                               : nullptr;
  for (int64_t t = 0; t < kBlock; ++t) {
    const bool attend = t < b.count && b.first + t < last && (!mask || mask[t * p.mask_strides[2]]);
    if (!attend) score[t] = kMinusInfinity;
    any |= attend;
  }
  return any;
}

// Queries of the task -> w.q, times scaling; clears the sums.
static void load_queries(const KvAttentionParams& p, int64_t batch, int64_t head, int64_t row0,
                         int64_t rows, Workspace& w) {
  // Rows are (token, query head of the group), heads fastest.
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = (row0 + r) / p.group, query_head = head * p.group + (row0 + r) % p.group;
    float* to = w.q + r * p.dim;
    with_float_type(p.q_type, p.q, [&](const auto* q) {
      load_floats(q + batch * p.q_strides[0] + query_head * p.q_strides[1] + token * p.q_strides[2],
                  to, p.dim);
    });
    for (int64_t d = 0; d < p.dim; ++d) to[d] *= p.scaling;
    w.top[r] = kMinusInfinity;
    w.total[r] = 0.0f;
  }
  for (int64_t i = 0; i < rows * w.width; ++i) w.out[i] = 0.0f;
}

// `row` [dim] float32 -> to, rounded to the type of q, and from there to int8 where a scale is
// given.
template <typename T>
static void store_output(const KvAttentionParams& p, float* row, int64_t at) {
  T* to = p.output_quantized ? reinterpret_cast<T*>(row) : static_cast<T*>(p.out) + at;
  int64_t c = 0;
  // In place where it is quantized: a rounded lane is never wider than the float32 one it is from.
  for (; c + kLanes <= p.dim; c += kLanes) store_float(to + c, load<FloatV>(row + c));
  if (c < p.dim) store_float_tail(to + c, load_float_tail(row + c, p.dim - c), p.dim - c);
  if (p.output_quantized) {
    quantize_row(to, static_cast<int8_t*>(p.out) + at, p.dim, p.output_quantizer);
  }
}

static void store_outputs(const KvAttentionParams& p, int64_t batch, int64_t head, int64_t row0,
                          int64_t rows, const Workspace& w) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = (row0 + r) / p.group, query_head = head * p.group + (row0 + r) % p.group;
    const float inverse = w.total[r] > 0.0f ? 1.0f / w.total[r] : 0.0f;  // nothing attended: zeros
    for (int64_t d = 0; d < p.dim; ++d) w.row[d] = w.out[r * w.width + w.column(d)] * inverse;
    const int64_t at = ((batch * p.tokens + token) * p.kv_heads * p.group + query_head) * p.dim;
    with_float_type(p.q_type, p.q, [&](const auto* q) {
      store_output<std::remove_cv_t<std::remove_pointer_t<decltype(q)>>>(p, w.row, at);
    });
  }
}

template <int BITS>
static void attend_task(const KvAttentionParams& p, int64_t batch, int64_t head, int64_t row0,
                        int64_t rows) {
  Workspace w(p.dim, BITS);
  load_queries(p, batch, head, row0, rows, w);

  for (int64_t first = 0; first < p.prefix; first += kBlock) {
    const int64_t count = p.prefix - first < kBlock ? p.prefix - first : kBlock;
    const int64_t at = (head * p.prefix + first) * p.dim;
    with_float_type(p.prefix_type, p.prefix_k,
                    [&](const auto* k) { unpack_float_k(k + at, p.dim, count, p.dim, w); });
    with_float_type(p.prefix_type, p.prefix_v,
                    [&](const auto* v) { unpack_float_v(v + at, p.dim, count, p.dim, w); });
    score_block(w, rows, p.dim, 1.0f);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = count; t < kBlock; ++t) w.score[r * kBlock + t] = kMinusInfinity;
    }
    attend_block(w, rows, count, 1.0f);
  }

  const float k_scale = BITS == 16 ? 1.0f : p.k_scale[head];
  const float v_scale = BITS == 16 ? 1.0f : p.v_scale[head];
  const int64_t last_token = (row0 + rows - 1) / p.group, cached = cached_keys(p, batch);
  const int64_t end = p.mask ? cached : cached - p.tokens + last_token + 1;
  for (int64_t first = 0; first < end;) {
    const KeyBlock block(p, batch, first, end);
    first += block.count;
    unpack_keys<BITS>(p, block, head, w);
    score_block(w, rows, p.dim, k_scale);
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      any |= apply_mask(p, batch, (row0 + r) / p.group, block, w.score + r * kBlock);
    }
    if (!any) continue;
    unpack_values<BITS>(p, block, head, w);
    attend_block(w, rows, block.count, v_scale);
  }
  store_outputs(p, batch, head, row0, rows, w);
}

// Tasks are numbered sequence by sequence, head by head. Later rows attend more keys: they go
// first, so that the threads end together.
void kv_attention_task(const KvAttentionParams& p, int64_t task) {
  const int64_t rows = p.tokens * p.group;
  const int64_t row_tasks = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t row0 = (row_tasks - 1 - task % row_tasks) * kMaxRows;
  const int64_t count = rows - row0 < kMaxRows ? rows - row0 : kMaxRows;
  const int64_t head = task / row_tasks % p.kv_heads, batch = task / row_tasks / p.kv_heads;
  if (p.bits == 4) {
    attend_task<4>(p, batch, head, row0, count);
  } else if (p.bits == 8) {
    attend_task<8>(p, batch, head, row0, count);
  } else {
    attend_task<16>(p, batch, head, row0, count);
  }
}

void kv_attention_kernel(const KvAttentionParams& p) {
  const int64_t rows = p.tokens * p.group;
  const int64_t tasks = p.batch * p.kv_heads * ((rows + kMaxRows - 1) / kMaxRows);
  // Below some 100k multiply-adds a parallel region costs more than it saves.
  const bool parallel =
      tasks > 1 && p.batch * p.kv_heads * rows * p.dim * (p.cached + p.prefix) > 1 << 17;
#pragma omp parallel for schedule(dynamic) num_threads(p.max_threads) if (parallel)
  for (int64_t task = 0; task < tasks; ++task) kv_attention_task(p, task);
}

PQ_ISA_NAMESPACE_END
