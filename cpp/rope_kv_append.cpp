// SPDX-License-Identifier: Apache-2.0
// rope_kv_append: q and k through RMSNorm (optional), RoPE and R3 in float32; q rounded to qkv's
// dtype, k less k_shift (optional) and v quantized (or rounded) into the rows of a cache that
// `slots` names.
//   qkv [T, (heads + 2 kv_heads) D] floating, contiguous last dimension; cos, sin float32
//   [positions, D]; positions int32 [T]; q_norm, k_norm [D] floating or absent; signs,
//   rotation_size as for hadamard, rotation_size D or 1; k_shift float32 [kv_heads, D] or absent;
//   slots int64 [T]; q [T, heads, D].
#include "argument_checks.h"
#include "isa.h"
#include "kv_cache.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using RopeKvKernel = void(const RopeKvRows&, int64_t row_begin, int64_t row_end, float* scratch);
PQ_KERNEL_TABLE(RopeKvKernel, rope_kv_append_rows);

namespace {

// cos and sin, and that every position is a row of them.
void check_tables(const ArgumentChecker& check, const TensorView& cos, const TensorView& sin,
                  const TensorView& positions, int64_t rows, int64_t dim) {
  check.on_cpu(cos, "cos");
  check.dtype(cos, "cos", DType::kFloat32);
  check.rank(cos, "cos", 2);
  check.size(cos, "cos", 1, dim);
  check.contiguous(cos, "cos");
  check.on_cpu(sin, "sin");
  check.dtype(sin, "sin", DType::kFloat32);
  check.same_shape(sin, "sin", cos, "cos");
  check.contiguous(sin, "sin");
  check_vector(check, positions, "positions", DType::kInt32, rows);
  for (int64_t t = 0; t < rows; ++t) {
    const int32_t position = positions.data<int32_t>()[t];
    PQ_CHECK(check.op, position >= 0 && position < cos.size(0),
             "positions: expected rows of the cos table, 0 to ", cos.size(0) - 1, ", got ",
             position);
  }
}

const void* norm_weight(const ArgumentChecker& check, const OptionalTensor& weight,
                        const char* name, int64_t dim, FloatType* type) {
  if (!weight) return nullptr;
  check.on_cpu(*weight, name);
  *type = float_type(check, *weight, name);
  check.rank(*weight, name, 1);
  check.size(*weight, name, 0, dim);
  check.contiguous(*weight, name);
  return weight->ptr;
}

// Rows of qkv and the head dimension, from the number of heads and the cache.
void check_heads(const ArgumentChecker& check, const TensorView& qkv, const TensorView& k_cache,
                 int64_t heads, int64_t kv_bits, RopeKvRows& p) {
  check.on_cpu(qkv, "qkv");
  p.type = float_type(check, qkv, "qkv");
  check.rank(qkv, "qkv", 2);
  PQ_CHECK(check.op, qkv.size(1) <= 1 || qkv.stride(1) == 1,
           "qkv: expected a contiguous last dimension, got stride ", qkv.stride(1));
  PQ_CHECK(check.op, kv_bits == 4 || kv_bits == 8 || kv_bits == 16,
           "kv_bits: expected 4, 8 or 16, got ", kv_bits);
  PQ_CHECK(check.op, k_cache.ndim == 4, "k_cache: expected 4 dimensions, got shape ",
           k_cache.shape_text());
  p.kv_heads = k_cache.size(1);
  PQ_CHECK(check.op, heads > 0 && p.kv_heads > 0 && heads % p.kv_heads == 0,
           "heads: expected a multiple of the ", p.kv_heads, " heads of k_cache, got ", heads);
  p.heads = heads;
  p.dim = k_cache.size(3) * (kv_bits == 4 ? 2 : 1);
  PQ_CHECK(check.op, p.dim > 0 && p.dim % 2 == 0,
           "k_cache: expected an even head dimension, got shape ", k_cache.shape_text());
  check.size(qkv, "qkv", 1, (heads + 2 * p.kv_heads) * p.dim);
  p.qkv = qkv.ptr;
  p.qkv_stride = qkv.stride(0);
}

}  // namespace

void rope_kv_append(const TensorView& qkv, const TensorView& cos, const TensorView& sin,
                    const TensorView& positions, const OptionalTensor& q_norm,
                    const OptionalTensor& k_norm, double eps, const OptionalTensor& signs,
                    int64_t rotation_size, const OptionalTensor& k_shift,
                    const OptionalTensor& k_scale, const OptionalTensor& v_scale, int64_t kv_bits,
                    const TensorView& k_cache, const TensorView& v_cache, const TensorView& slots,
                    int64_t heads, const TensorView& q) {
  const ArgumentChecker check{"rope_kv_append"};
  RopeKvRows p{};
  check_heads(check, qkv, k_cache, heads, kv_bits, p);
  const int64_t rows = qkv.size(0);
  const CacheView cache(check, k_cache, v_cache, k_scale, v_scale, kv_bits, p.dim);
  check_tables(check, cos, sin, positions, rows, p.dim);
  PQ_CHECK(check.op, q_norm.has_value() == k_norm.has_value(),
           "k_norm: expected with q_norm or without it, got only one of the two");
  p.q_norm = norm_weight(check, q_norm, "q_norm", p.dim, &p.norm_type);
  if (k_norm) check.dtype(*k_norm, "k_norm", q_norm->dtype);
  p.k_norm = norm_weight(check, k_norm, "k_norm", p.dim, &p.norm_type);
  PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
  p.eps = eps;
  PQ_CHECK(check.op, rotation_size == 1 || rotation_size == p.dim,
           "rotation_size: expected 1 or the head dimension ", p.dim, ", got ", rotation_size);
  p.rotation = hadamard_params(check, signs, rotation_size);
  p.k_shift = head_shift(check, k_shift, "k_shift", p.kv_heads, p.dim);
  check_vector(check, slots, "slots", DType::kInt64, rows);
  for (int64_t t = 0; t < rows; ++t) {
    PQ_CHECK(check.op, slots.data<int64_t>()[t] < cache.pages * cache.page_size,
             "slots: expected rows of the cache, below ", cache.pages * cache.page_size, ", got ",
             slots.data<int64_t>()[t]);
  }
  check.on_cpu(q, "q");
  check.dtype(q, "q", qkv.dtype);
  PQ_CHECK(check.op, q.ndim == 3 && q.size(0) == rows && q.size(1) == heads && q.size(2) == p.dim,
           "q: expected shape [", rows, ", ", heads, ", ", p.dim, "], got ", q.shape_text());
  check.contiguous(q, "q");

  p.cos = cos.data<float>();
  p.sin = sin.data<float>();
  p.positions = positions.data<int32_t>();
  p.kv_bits = cache.bits;
  if (cache.bits < 16) {
    p.k_scale = k_scale->data<float>();
    p.v_scale = v_scale->data<float>();
  }
  p.k_cache = k_cache.ptr;
  p.v_cache = v_cache.ptr;
  p.cache_type = cache.type;
  copy_strides(k_cache, p.k_strides);
  copy_strides(v_cache, p.v_strides);
  p.page_size = cache.page_size;
  p.slots = slots.data<int64_t>();
  p.q = q.ptr;
  const auto kernel = rope_kv_append_rows_table.pick();
  for_row_ranges(
      rows, qkv.size(1) * (6 + p.rotation.k), 4 * (p.dim + 16),
      [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
}

}  // namespace prefixquant
