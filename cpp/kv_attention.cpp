// SPDX-License-Identifier: Apache-2.0
// kv_attention: queries over [16-bit prefix | 4-bit or 8-bit cache], in float32.
//
//   s   = scaling * q . [prefix_k | k_scale * k]     masked logits are -inf
//   out = softmax(s) . [prefix_v | v_scale * v]      zeros where nothing is attended
#include "kv_attention_params.h"

#include <omp.h>

#include "isa.h"
#include "ops.h"

namespace prefixquant {

using KvAttentionKernel = void(const KvAttentionParams&);
PQ_KERNEL_TABLE(KvAttentionKernel, kv_attention_kernel);

namespace {

FloatType float_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return FloatType::kBFloat16;
    case DType::kFloat16:
      return FloatType::kFloat16;
    default:
      return FloatType::kFloat32;
  }
}

void check_last_contiguous(const ArgumentChecker& check, const TensorView& t, const char* name) {
  PQ_CHECK(check.op, t.size(-1) <= 1 || t.stride(-1) == 1, name,
           ": expected a contiguous last dimension, got stride ", t.stride(-1));
}

// Batch, heads and tokens of k or v; dim comes from q.
int check_cache(const ArgumentChecker& check, const TensorView& t, const char* name, int64_t dim) {
  check.on_cpu(t, name);
  PQ_CHECK(check.op, t.dtype == DType::kUInt8 || t.dtype == DType::kInt8, name,
           ": expected dtype uint8 (packed 4-bit) or int8, got ", dtype_name(t.dtype));
  check.rank(t, name, 4);
  const int bits = t.dtype == DType::kUInt8 ? 4 : 8;
  check.size(t, name, 3, bits == 4 ? dim / 2 : dim);
  check_last_contiguous(check, t, name);
  return bits;
}

void check_scale(const ArgumentChecker& check, const TensorView& t, const char* name,
                 int64_t heads) {
  check.on_cpu(t, name);
  check.dtype(t, name, DType::kFloat32);
  check.rank(t, name, 1);
  check.size(t, name, 0, heads);
  check.contiguous(t, name);
}

}  // namespace

void kv_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                  const TensorView& k_scale, const TensorView& v_scale, const TensorView& prefix_k,
                  const TensorView& prefix_v, const OptionalTensor& mask, double scaling,
                  const TensorView& out) {
  const ArgumentChecker check{"kv_attention"};
  check.on_cpu(q, "q");
  check.floating(q, "q");
  check.rank(q, "q", 4);
  check_last_contiguous(check, q, "q");
  const int64_t batch = q.size(0), query_heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  PQ_CHECK(check.op, dim > 0 && dim % 2 == 0, "q: expected an even last dimension, got shape ",
           q.shape_text());

  const int bits = check_cache(check, k, "k", dim);
  const int64_t kv_heads = k.size(1), cached = k.size(2);
  check.size(k, "k", 0, batch);
  PQ_CHECK(check.op, kv_heads > 0 && query_heads % kv_heads == 0,
           "k: expected a number of heads that divides the ", query_heads, " of q, got shape ",
           k.shape_text());
  check.dtype(v, "v", k.dtype);
  check_cache(check, v, "v", dim);
  check.same_shape(v, "v", k, "k");
  check_scale(check, k_scale, "k_scale", kv_heads);
  check_scale(check, v_scale, "v_scale", kv_heads);

  check.on_cpu(prefix_k, "prefix_k");
  check.floating(prefix_k, "prefix_k");
  check.rank(prefix_k, "prefix_k", 3);
  check.size(prefix_k, "prefix_k", 0, kv_heads);
  check.size(prefix_k, "prefix_k", 2, dim);
  check.contiguous(prefix_k, "prefix_k");
  check.on_cpu(prefix_v, "prefix_v");
  check.dtype(prefix_v, "prefix_v", prefix_k.dtype);
  check.same_shape(prefix_v, "prefix_v", prefix_k, "prefix_k");
  check.contiguous(prefix_v, "prefix_v");

  KvAttentionParams p{};
  if (mask) {
    check.on_cpu(*mask, "mask");
    check.dtype(*mask, "mask", DType::kBool);
    check.rank(*mask, "mask", 4);
    PQ_CHECK(check.op, mask->size(0) == batch || mask->size(0) == 1, "mask: expected size ", batch,
             " or 1 in dimension 0, got shape ", mask->shape_text());
    check.size(*mask, "mask", 1, 1);
    check.size(*mask, "mask", 2, tokens);
    check.size(*mask, "mask", 3, cached);
    p.mask = mask->data<uint8_t>();
    p.mask_strides[0] = mask->size(0) == 1 ? 0 : mask->stride(0);
    p.mask_strides[1] = mask->stride(2);
    p.mask_strides[2] = mask->stride(3);
  }
  check.on_cpu(out, "out");
  check.dtype(out, "out", q.dtype);
  PQ_CHECK(check.op,
           out.ndim == 4 && out.size(0) == batch && out.size(1) == tokens &&
               out.size(2) == query_heads && out.size(3) == dim,
           "out: expected shape [", batch, ", ", tokens, ", ", query_heads, ", ", dim, "], got ",
           out.shape_text());
  check.contiguous(out, "out");
  if (out.numel() == 0) return;

  p.q = q.ptr;
  p.q_type = float_type(q.dtype);
  p.k = k.ptr;
  p.v = v.ptr;
  for (int i = 0; i < 3; ++i) {
    p.q_strides[i] = q.stride(i);
    p.k_strides[i] = k.stride(i);
    p.v_strides[i] = v.stride(i);
  }
  p.bits = bits;
  p.k_scale = k_scale.data<float>();
  p.v_scale = v_scale.data<float>();
  p.prefix_k = prefix_k.ptr;
  p.prefix_v = prefix_v.ptr;
  p.prefix_type = float_type(prefix_k.dtype);
  p.out = out.ptr;
  p.scaling = static_cast<float>(scaling);
  p.batch = batch;
  p.kv_heads = kv_heads;
  p.group = query_heads / kv_heads;
  p.tokens = tokens;
  p.cached = cached;
  p.prefix = prefix_k.size(1);
  p.dim = dim;
  p.max_threads = omp_get_max_threads();
  kv_attention_kernel_table.pick()(p);
}

}  // namespace prefixquant
