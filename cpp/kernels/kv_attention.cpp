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
// unpacked once for all rows of the task.
//
//   K panel [dim, kBlock]: lanes are tokens, so that a score needs no sum across lanes.
//   V panel [kBlock, width]: lanes are channels. For 4 bits the even channels come first, then,
//   from half_width on, the odd ones: low and high nibbles are never interleaved, only the final
//   output is.
#include "../kv_attention_params.h"

#include <omp.h>

#include "../gemm_params.h"
#include "exp.h"
#include "isa_namespace.h"
#include "simd.h"

PQ_ISA_NAMESPACE_BEGIN

using FloatV = Floats<kLanes>;
using IntV = Ints<kLanes>;

constexpr int64_t kBlock = 32;    // tokens of a key block
constexpr int64_t kMaxRows = 64;  // rows of a task
constexpr int64_t kBlockVectors = kBlock / kLanes;
constexpr int kTileRows = 4;  // rows sharing the loads of a panel
constexpr float kMinusInfinity = -__builtin_inff();

PQ_INLINE int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

PQ_INLINE FloatV broadcast(float v) { return v - FloatV{}; }

template <typename T>
struct RemoveConst;
template <typename T>
struct RemoveConst<const T*> {
  using type = T;
};

// exp(x) for x <= 0, zero below -87: a masked logit must not pay for subnormal arithmetic.
PQ_INLINE FloatV exp_negative(FloatV x) {
  const FloatV e = exp_lanes(x > -87.0f ? x : broadcast(-87.0f));
  return x > -87.0f ? e : FloatV{};
}

// The buffers of one task, in one piece of thread scratch.
struct Workspace {
  float* q;         // [kMaxRows, dim], times scaling
  float* out;       // [kMaxRows, width], not yet divided by total
  float* k_panel;   // [dim, kBlock]
  float* v_panel;   // [kBlock, width]
  float* score;     // [kMaxRows, kBlock]: logits, then probabilities
  float* top;       // [kMaxRows]: greatest logit so far
  float* total;     // [kMaxRows]: sum of exp(logit - top)
  float* row;       // [dim]: one row on its way in or out
  uint32_t* words;  // [words of a K row, kBlock]
  int64_t half_width;
  int64_t width;

  Workspace(int64_t dim, int bits) {
    half_width = bits == 4 ? round_up_lanes(dim / 2) : 0;
    width = bits == 4 ? 2 * half_width : round_up_lanes(dim);
    const int64_t word_count = (dim * bits / 8 + 3) / 4;
    const int64_t sizes[] = {kMaxRows * dim,     kMaxRows * width, dim * kBlock, kBlock * width,
                             kMaxRows * kBlock,  kMaxRows,         kMaxRows,     dim,
                             word_count * kBlock};
    int64_t total_floats = 0;
    for (int64_t size : sizes) total_floats += (size + 15) / 16 * 16;
    float* at = static_cast<float*>(thread_scratch(ScratchSlot::kPanel, total_floats * 4));
    float** fields[] = {&q, &out, &k_panel, &v_panel, &score, &top, &total, &row};
    for (int i = 0; i < 8; ++i) {
      *fields[i] = at;
      at += (sizes[i] + 15) / 16 * 16;
    }
    words = reinterpret_cast<uint32_t*>(at);
  }

  // Where channel d lies in a row of v_panel and out.
  int64_t column(int64_t d) const { return half_width ? d % 2 * half_width + d / 2 : d; }
};

// ---- unpacking ----

// K of `count` cached tokens -> k_panel; the columns of missing tokens are zero. Every 32-bit word
// of a row (8 or 4 channels) is first laid beside the same word of the other tokens.
template <int BITS>
static void unpack_k(const uint8_t* k, int64_t stride, int64_t count, int64_t dim, Workspace& w) {
  constexpr int kPerWord = 32 / BITS;
  const int64_t bytes = dim * BITS / 8;
  const int64_t whole = bytes / 4;
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* row = k + t * stride;
    for (int64_t j = 0; j < whole; ++j) w.words[j * kBlock + t] = load<uint32_t>(row + 4 * j);
    if (bytes % 4) {
      uint32_t last = 0;
      __builtin_memcpy(&last, row + 4 * whole, bytes % 4);
      w.words[whole * kBlock + t] = last;
    }
  }
  for (int64_t t = count; t < kBlock; ++t) {
    for (int64_t j = 0; j < (bytes + 3) / 4; ++j) w.words[j * kBlock + t] = 0;
  }
  for (int64_t d0 = 0; d0 < dim; d0 += kPerWord) {
    for (int64_t i = 0; i < kBlockVectors; ++i) {
      const IntV word = load<IntV>(w.words + d0 / kPerWord * kBlock + i * kLanes);
      for (int c = 0; c < kPerWord && d0 + c < dim; ++c) {
        const IntV value =
            word << (32 - BITS - BITS * c) >> (32 - BITS);  // up, then down with sign
        store(w.k_panel + (d0 + c) * kBlock + i * kLanes, __builtin_convertvector(value, FloatV));
      }
    }
  }
}

// kLanes signed bytes, widened. (GCC 12 turns the vector conversion into one insertion a lane.)
PQ_INLINE IntV load_bytes(const uint8_t* from) {
#if defined(PQ_ISA_avx512) || defined(PQ_ISA_amx)
  return (IntV)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(PQ_ISA_avx2)
  return (IntV)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return __builtin_convertvector(load<Bytes<kLanes> >(from), IntV);
#endif
}

template <int BITS>
PQ_INLINE void unpack_v_lanes(const uint8_t* from, float* to, int64_t half_width) {
  const IntV wide = load_bytes(from);
  if constexpr (BITS == 4) {
    store(to, __builtin_convertvector(wide << 28 >> 28, FloatV));
    store(to + half_width, __builtin_convertvector(wide >> 4, FloatV));
  } else {
    store(to, __builtin_convertvector(wide, FloatV));
  }
}

// V of `count` cached tokens -> v_panel; rows of missing tokens are never read afterwards.
template <int BITS>
static void unpack_v(const uint8_t* v, int64_t stride, int64_t count, int64_t dim, Workspace& w) {
  const int64_t bytes = dim * BITS / 8;
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* row = v + t * stride;
    float* to = w.v_panel + t * w.width;
    int64_t c = 0;
    for (; c + kLanes <= bytes; c += kLanes) {
      unpack_v_lanes<BITS>(row + c, to + c, w.half_width);
    }
    if (c < bytes) {
      uint8_t padded[kLanes] = {};
      __builtin_memcpy(padded, row + c, bytes - c);
      unpack_v_lanes<BITS>(padded, to + c, w.half_width);
    }
  }
}

// Prefix tokens -> both panels. A handful of tokens: clarity before speed.
static void unpack_prefix(const KvAttentionParams& p, int64_t head, int64_t first, int64_t count,
                          Workspace& w) {
  float* row = w.row;
  const auto convert_row = [&](const void* from, int64_t token) {
    const int64_t at = (head * p.prefix + token) * p.dim;
    with_float_type(p.prefix_type, from, [&](const auto* data) {
      int64_t c = 0;
      for (; c + kLanes <= p.dim; c += kLanes) store(row + c, load_float(data + at + c));
      if (c == p.dim) return;
      const FloatV last = load_float_tail(data + at + c, p.dim - c);
      __builtin_memcpy(row + c, &last, (p.dim - c) * sizeof(float));
    });
  };
  for (int64_t i = 0; i < p.dim * kBlock; ++i) w.k_panel[i] = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    convert_row(p.prefix_k, first + t);
    for (int64_t d = 0; d < p.dim; ++d) w.k_panel[d * kBlock + t] = row[d];
    convert_row(p.prefix_v, first + t);
    float* to = w.v_panel + t * w.width;
    for (int64_t c = 0; c < w.width; ++c) to[c] = 0.0f;
    for (int64_t d = 0; d < p.dim; ++d) to[w.column(d)] = row[d];
  }
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

// Sets the logits of keys [first, first + count) that row (batch, token) may not attend to -inf,
// and those past the end. Returns whether any may be attended.
static bool apply_mask(const KvAttentionParams& p, int64_t batch, int64_t token, int64_t first,
                       int64_t count, float* score) {
  bool any = false;
  // Causal, aligned to the lower right: the last token sees the whole cache.
  const int64_t last = p.mask ? p.cached : p.cached - p.tokens + token + 1;
  const uint8_t* mask = p.mask ? p.mask + batch * p.mask_strides[0] + token * p.mask_strides[1] +
                                     first * p.mask_strides[2]
                               : nullptr;
  for (int64_t t = 0; t < kBlock; ++t) {
    const bool attend = t < count && first + t < last && (!mask || mask[t * p.mask_strides[2]]);
    if (!attend) score[t] = kMinusInfinity;
    any |= attend;
  }
  return any;
}

template <int BITS>
static void attend_task(const KvAttentionParams& p, int64_t batch, int64_t head, int64_t row0,
                        int64_t rows) {
  Workspace w(p.dim, BITS);
  // Rows are (token, query head of the group), heads fastest.
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = (row0 + r) / p.group, query_head = head * p.group + (row0 + r) % p.group;
    with_float_type(p.q_type, p.q, [&](const auto* q) {
      const auto* from =
          q + batch * p.q_strides[0] + query_head * p.q_strides[1] + token * p.q_strides[2];
      float* to = w.q + r * p.dim;
      int64_t c = 0;
      for (; c + kLanes <= p.dim; c += kLanes) store(to + c, load_float(from + c) * p.scaling);
      if (c < p.dim) {
        const FloatV last = load_float_tail(from + c, p.dim - c) * p.scaling;
        __builtin_memcpy(to + c, &last, (p.dim - c) * sizeof(float));
      }
    });
    w.top[r] = kMinusInfinity;
    w.total[r] = 0.0f;
  }
  for (int64_t i = 0; i < rows * w.width; ++i) w.out[i] = 0.0f;

  for (int64_t first = 0; first < p.prefix; first += kBlock) {
    const int64_t count = p.prefix - first < kBlock ? p.prefix - first : kBlock;
    unpack_prefix(p, head, first, count, w);
    score_block(w, rows, p.dim, 1.0f);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = count; t < kBlock; ++t) w.score[r * kBlock + t] = kMinusInfinity;
    }
    attend_block(w, rows, count, 1.0f);
  }

  const int64_t last_token = (row0 + rows - 1) / p.group;
  const int64_t end = p.mask ? p.cached : p.cached - p.tokens + last_token + 1;
  for (int64_t first = 0; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    unpack_k<BITS>(p.k + batch * p.k_strides[0] + head * p.k_strides[1] + first * p.k_strides[2],
                   p.k_strides[2], count, p.dim, w);
    score_block(w, rows, p.dim, p.k_scale[head]);
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      any |= apply_mask(p, batch, (row0 + r) / p.group, first, count, w.score + r * kBlock);
    }
    if (!any) continue;
    unpack_v<BITS>(p.v + batch * p.v_strides[0] + head * p.v_strides[1] + first * p.v_strides[2],
                   p.v_strides[2], count, p.dim, w);
    attend_block(w, rows, count, p.v_scale[head]);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = (row0 + r) / p.group, query_head = head * p.group + (row0 + r) % p.group;
    const float inverse = w.total[r] > 0.0f ? 1.0f / w.total[r] : 0.0f;  // nothing attended: zeros
    float* row = w.row;
    for (int64_t d = 0; d < p.dim; ++d) row[d] = w.out[r * w.width + w.column(d)] * inverse;
    with_float_type(p.q_type, p.out, [&](const auto* out) {
      using Out = typename RemoveConst<decltype(out)>::type;
      Out* to = const_cast<Out*>(out) +
                ((batch * p.tokens + token) * p.kv_heads * p.group + query_head) * p.dim;
      int64_t c = 0;
      for (; c + kLanes <= p.dim; c += kLanes) store_float(to + c, load<FloatV>(row + c));
      if (c < p.dim) store_float_tail(to + c, load_float_tail(row + c, p.dim - c), p.dim - c);
    });
  }
}

void kv_attention_kernel(const KvAttentionParams& p) {
  const int64_t rows = p.tokens * p.group;
  const int64_t row_tasks = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t tasks = p.batch * p.kv_heads * row_tasks;
  // Below some 100k multiply-adds a parallel region costs more than it saves.
  const bool parallel =
      tasks > 1 && p.batch * p.kv_heads * rows * p.dim * (p.cached + p.prefix) > 1 << 17;
#pragma omp parallel for schedule(dynamic) num_threads(p.max_threads) if (parallel)
  for (int64_t task = 0; task < tasks; ++task) {
    // Later rows attend more keys: they go first, so that the threads end together.
    const int64_t row0 = (row_tasks - 1 - task % row_tasks) * kMaxRows;
    const int64_t count = rows - row0 < kMaxRows ? rows - row0 : kMaxRows;
    const int64_t head = task / row_tasks % p.kv_heads, batch = task / row_tasks / p.kv_heads;
    if (p.bits == 4) {
      attend_task<4>(p, batch, head, row0, count);
    } else {
      attend_task<8>(p, batch, head, row0, count);
    }
  }
}

PQ_ISA_NAMESPACE_END
