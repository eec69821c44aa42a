// SPDX-License-Identifier: Apache-2.0
// kv_decode_attention and kv_prefill_attention: flat query tokens over [prefix | rows of a paged or
// contiguous cache], in float32, by the kernel of kv_attention.
//   s   = scaling * q . [prefix_k | k_scale * k]
//   out = softmax(s) . [prefix_v | v_scale * v]      zeros where nothing is attended
//   decode: q [B, Hq, D], one token a sequence, which attends the first lengths[b] rows.
//   prefill: q [T, Hq, D], the tokens at rows start .. start + T - 1 of one sequence, causal.
#include <omp.h>

#include "isa.h"
#include "kv_attention_params.h"
#include "kv_cache.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using KvAttentionKernel = void(const KvAttentionParams&);
PQ_KERNEL_TABLE(KvAttentionKernel, kv_attention_kernel);

namespace {

struct CacheArguments {
  const TensorView& k;
  const TensorView& v;
  const OptionalTensor& k_scale;
  const OptionalTensor& v_scale;
  const TensorView& prefix_k;  // [kv_heads, P, D] floating, contiguous
  const TensorView& prefix_v;
  int64_t kv_bits;
};

// All of p but the batch, the tokens and the cached lengths.
CacheView check_tensors(const ArgumentChecker& check, const TensorView& q,
                        const CacheArguments& cache, double scaling, KvAttentionParams& p) {
  check.on_cpu(q, "q");
  p.q_type = float_type(check, q, "q");
  check.rank(q, "q", 3);
  p.dim = q.size(2);
  PQ_CHECK(check.op, p.dim > 0 && p.dim % 2 == 0, "q: expected an even last dimension, got shape ",
           q.shape_text());
  PQ_CHECK(check.op, q.stride(2) == 1, "q: expected a contiguous last dimension, got stride ",
           q.stride(2));
  const CacheView view(check, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.kv_bits, p.dim);
  PQ_CHECK(check.op, q.size(1) > 0 && q.size(1) % view.kv_heads == 0,
           "q: expected a multiple of the ", view.kv_heads, " heads of k_cache, got shape ",
           q.shape_text());
  p.prefix_type = float_type(check, cache.prefix_k, "prefix_k");
  check.on_cpu(cache.prefix_k, "prefix_k");
  check.rank(cache.prefix_k, "prefix_k", 3);
  check.size(cache.prefix_k, "prefix_k", 0, view.kv_heads);
  check.size(cache.prefix_k, "prefix_k", 2, p.dim);
  check.contiguous(cache.prefix_k, "prefix_k");
  check.on_cpu(cache.prefix_v, "prefix_v");
  check.dtype(cache.prefix_v, "prefix_v", cache.prefix_k.dtype);
  check.same_shape(cache.prefix_v, "prefix_v", cache.prefix_k, "prefix_k");
  check.contiguous(cache.prefix_v, "prefix_v");

  p.q = q.ptr;
  p.k = cache.k.ptr;
  p.v = cache.v.ptr;
  copy_strides(cache.k, p.k_strides);
  copy_strides(cache.v, p.v_strides);
  p.bits = view.bits;
  p.cache_type = view.type;
  if (view.bits < 16) {
    p.k_scale = cache.k_scale->data<float>();
    p.v_scale = cache.v_scale->data<float>();
  }
  p.page_size = view.page_size;
  p.prefix_k = cache.prefix_k.ptr;
  p.prefix_v = cache.prefix_v.ptr;
  p.prefix = cache.prefix_k.size(1);
  p.scaling = static_cast<float>(scaling);
  p.kv_heads = view.kv_heads;
  p.group = q.size(1) / view.kv_heads;
  p.max_threads = omp_get_max_threads();
  return view;
}

// The page table's shape; returns how many rows a sequence may have.
int64_t check_table(const ArgumentChecker& check, const OptionalTensor& table,
                    const CacheView& view, int64_t sequences) {
  if (!table) {
    PQ_CHECK(check.op, sequences <= view.pages, "k_cache: expected a page for each of the ",
             sequences, " sequences, got ", view.pages);
    return view.page_size;
  }
  check.on_cpu(*table, "block_table");
  check.dtype(*table, "block_table", DType::kInt32);
  check.rank(*table, "block_table", 2);
  check.contiguous(*table, "block_table");
  PQ_CHECK(check.op, table->size(0) >= sequences, "block_table: expected at least ", sequences,
           " rows, got shape ", table->shape_text());
  return table->size(1) * view.page_size;
}

// That the first `length` rows of a sequence lie in pages of the cache.
void check_pages(const ArgumentChecker& check, const OptionalTensor& table, const CacheView& view,
                 int64_t sequence, int64_t length) {
  if (!table) return;
  const int32_t* row = table->data<int32_t>() + sequence * table->size(1);
  for (int64_t i = 0; i * view.page_size < length; ++i) {
    PQ_CHECK(check.op, row[i] >= 0 && row[i] < view.pages, "block_table: expected pages 0 to ",
             view.pages - 1, " for the ", length, " rows of sequence ", sequence, ", got ", row[i]);
  }
}

void check_output(const ArgumentChecker& check, const TensorView& q, const TensorView& out,
                  DType dtype) {
  check.on_cpu(out, "out");
  check.dtype(out, "out", dtype);
  check.rank(out, "out", 2);
  check.size(out, "out", 0, q.size(0));
  check.size(out, "out", 1, q.size(1) * q.size(2));
  check.contiguous(out, "out");
}

}  // namespace

void kv_decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         const TensorView& prefix_k, const TensorView& prefix_v,
                         const TensorView& lengths, const OptionalTensor& block_table,
                         int64_t kv_bits, int64_t max_length, double scaling,
                         const OptionalTensor& output_scale, int64_t output_bits,
                         const TensorView& out) {
  const ArgumentChecker check{"kv_decode_attention"};
  const CacheArguments cache{k_cache, v_cache, k_scale, v_scale, prefix_k, prefix_v, kv_bits};
  KvAttentionParams p{};
  const CacheView view = check_tensors(check, q, cache, scaling, p);
  p.batch = q.size(0);
  p.tokens = 1;
  p.q_strides[0] = q.stride(0);
  p.q_strides[1] = q.stride(1);
  check.on_cpu(lengths, "lengths");
  check.dtype(lengths, "lengths", DType::kInt32);
  check.rank(lengths, "lengths", 1);
  check.size(lengths, "lengths", 0, p.batch);
  check.contiguous(lengths, "lengths");
  const int64_t capacity = check_table(check, block_table, view, p.batch);
  PQ_CHECK(check.op, max_length >= 0 && max_length <= capacity, "max_length: expected 0 to ",
           capacity, " (the rows of a sequence), got ", max_length);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t length = lengths.data<int32_t>()[b];
    PQ_CHECK(check.op, length >= 0 && length <= max_length, "lengths: expected 0 to max_length ",
             max_length, ", got ", length);
    check_pages(check, block_table, view, b, length);
  }
  DType out_dtype = q.dtype;
  if (output_scale) {
    const ArgumentChecker output_check{"kv_decode_attention: output"};
    p.output_quantizer = quantizer_params(output_check, *output_scale, output_bits);
    p.output_quantized = true;
    out_dtype = DType::kInt8;
  }
  check_output(check, q, out, out_dtype);
  if (out.numel() == 0) return;
  if (block_table) {
    p.block_table = block_table->data<int32_t>();
    p.block_table_stride = block_table->size(1);
  }
  p.lengths = lengths.data<int32_t>();
  p.cached = max_length;
  p.out = out.ptr;
  kv_attention_kernel_table.pick()(p);
}

void kv_prefill_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                          const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                          const TensorView& prefix_k, const TensorView& prefix_v, int64_t kv_bits,
                          int64_t start, double scaling, int64_t sequence,
                          const OptionalTensor& block_table, const TensorView& out) {
  const ArgumentChecker check{"kv_prefill_attention"};
  const CacheArguments cache{k_cache, v_cache, k_scale, v_scale, prefix_k, prefix_v, kv_bits};
  KvAttentionParams p{};
  const CacheView view = check_tensors(check, q, cache, scaling, p);
  PQ_CHECK(check.op, sequence >= 0, "sequence: expected 0 or more, got ", sequence);
  p.batch = 1;
  p.tokens = q.size(0);
  p.q_strides[1] = q.stride(1);
  p.q_strides[2] = q.stride(0);
  const int64_t capacity = check_table(check, block_table, view, sequence + 1);
  PQ_CHECK(check.op, start >= 0, "start: expected 0 or more, got ", start);
  PQ_CHECK(check.op, start + p.tokens <= capacity, "start: expected the tokens to end at row ",
           capacity, " or before, got ", start + p.tokens);
  p.cached = start + p.tokens;
  check_pages(check, block_table, view, sequence, p.cached);
  check_output(check, q, out, q.dtype);
  if (out.numel() == 0) return;
  if (block_table) {
    p.block_table = block_table->data<int32_t>() + sequence * block_table->size(1);
    p.block_table_stride = block_table->size(1);
  } else {
    p.first_page = sequence;
  }
  p.out = out.ptr;
  kv_attention_kernel_table.pick()(p);
}

}  // namespace prefixquant
