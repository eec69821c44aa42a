// SPDX-License-Identifier: Apache-2.0
// Checks and launches of what writes a KV cache on the GPU, and reads it back as floats:
// rope_kv_append, kv_quantize, kv_append, kv_dequantize. Interfaces:
// cuda/include/prefixquant/{rope_kv_append,kv_quant}.h.
#include "prefixquant/rope_kv_append.h"

#include "argument_checks.h"
#include "kv_cuda.h"
#include "ops_cuda.h"
#include "prefixquant/kv_quant.h"
#include "rows_cuda.h"

namespace prefixquant {
namespace {

constexpr int64_t kMaxDim = 1024;  // a head's row in shared memory

void check_last_contiguous(const ArgumentChecker& check, const TensorView& t, const char* name) {
  PQ_CHECK(check.op, t.size(-1) <= 1 || t.stride(-1) == 1, name,
           ": expected a contiguous last dimension, got stride ", t.stride(-1));
}

void check_vector(const ArgumentChecker& check, const TensorView& t, const char* name, DType dtype,
                  int64_t size, int device) {
  check.on_cuda(t, name, device);
  check.dtype(t, name, dtype);
  check.rank(t, name, 1);
  check.size(t, name, 0, size);
  check.contiguous(t, name);
}

// The k part of a Hadamard over `dim`; its values are +-1 by contract, not read here.
void take_rotation(const ArgumentChecker& check, const OptionalTensor& signs, int64_t size,
                   const char* size_name, int64_t dim, int device, const int8_t** data, int* k) {
  PQ_CHECK(check.op, size == 1 || size == dim, size_name, ": expected 1 or the head dimension ",
           dim, ", got ", size);
  int64_t size_of_signs = 1;
  *data = checked_cuda_signs(check, signs, size, std::string(size_name) + ": expected", device,
                             size_of_signs);
  *k = static_cast<int>(size_of_signs);  // at most the head dimension
}

const void* take_norm(const ArgumentChecker& check, const OptionalTensor& t, const char* name,
                      int64_t dim, int device, KvDtype* dtype) {
  if (!t) return nullptr;
  check.floating(*t, name);
  check_vector(check, *t, name, t->dtype, dim, device);
  *dtype = kv_dtype(check, *t, name);
  return t->ptr;
}

const float* take_shift(const ArgumentChecker& check, const OptionalTensor& t, const char* name,
                        int64_t heads, int64_t dim, int device) {
  if (!t) return nullptr;
  check.on_cuda(*t, name, device);
  return head_vectors(check, *t, name, heads, dim);
}

// [pages, heads, page_size, row] of a cache of `bits`; strides in bytes.
void take_cache(const ArgumentChecker& check, const TensorView& t, const char* name, int64_t bits,
                int device, int64_t (&strides)[3]) {
  check.on_cuda(t, name, device);
  if (bits == 16) {
    check.floating(t, name);
  } else {
    check.dtype(t, name, bits == 4 ? DType::kUInt8 : DType::kInt8);
  }
  check.rank(t, name, 4);
  check_last_contiguous(check, t, name);
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i) * dtype_bytes(t.dtype);
}

void check_bits(const ArgumentChecker& check, int64_t bits) {
  PQ_CHECK(check.op, bits == 4 || bits == 8, "bits: expected 4 or 8, got ", bits);
}

}  // namespace

void rope_kv_append_cuda(const TensorView& qkv, const TensorView& cos, const TensorView& sin,
                         const TensorView& positions, const OptionalTensor& q_norm,
                         const OptionalTensor& k_norm, double eps, const OptionalTensor& signs,
                         int64_t rotation_size, const OptionalTensor& k_shift,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         int64_t kv_bits, const TensorView& k_cache, const TensorView& v_cache,
                         const TensorView& slots, int64_t heads, const TensorView& q,
                         uintptr_t stream) {
  const ArgumentChecker check{"rope_kv_append"};
  const int device = qkv.device;
  RopeKvAppendParams p;
  check.on_cuda(qkv, "qkv", device);
  check.floating(qkv, "qkv");
  check.rank(qkv, "qkv", 2);
  check_last_contiguous(check, qkv, "qkv");
  PQ_CHECK(check.op, kv_bits == 4 || kv_bits == 8 || kv_bits == 16,
           "kv_bits: expected 4, 8 or 16, got ", kv_bits);
  take_cache(check, k_cache, "k_cache", kv_bits, device, p.k_strides);
  check.dtype(v_cache, "v_cache", k_cache.dtype);
  take_cache(check, v_cache, "v_cache", kv_bits, device, p.v_strides);
  check.same_shape(v_cache, "v_cache", k_cache, "k_cache");
  p.kv_heads = checked_size(check, "k_cache", k_cache.size(1));
  PQ_CHECK(check.op, heads > 0 && p.kv_heads > 0 && heads % p.kv_heads == 0,
           "heads: expected a multiple of the ", p.kv_heads, " heads of k_cache, got ", heads);
  p.heads = checked_size(check, "heads", heads);
  const int64_t dim = k_cache.size(3) * (kv_bits == 4 ? 2 : 1);
  PQ_CHECK(check.op, dim > 0 && dim % 2 == 0 && dim <= kMaxDim,
           "k_cache: expected an even head dimension of at most ", kMaxDim, ", got shape ",
           k_cache.shape_text());
  p.dim = static_cast<int>(dim);
  check.size(qkv, "qkv", 1, (heads + 2 * int64_t{p.kv_heads}) * dim);
  p.tokens = checked_size(check, "qkv", qkv.size(0));
  p.qkv = qkv.ptr;
  p.dtype = kv_dtype(check, qkv, "qkv");
  p.qkv_stride = qkv.stride(0);

  check.on_cuda(cos, "cos", device);
  check.dtype(cos, "cos", DType::kFloat32);
  check.rank(cos, "cos", 2);
  check.size(cos, "cos", 1, dim);
  check.contiguous(cos, "cos");
  check.on_cuda(sin, "sin", device);
  check.dtype(sin, "sin", DType::kFloat32);
  check.same_shape(sin, "sin", cos, "cos");
  check.contiguous(sin, "sin");
  check_vector(check, positions, "positions", DType::kInt32, p.tokens, device);
  check_vector(check, slots, "slots", DType::kInt64, p.tokens, device);
  p.cos = cos.data<float>();
  p.sin = sin.data<float>();
  p.positions = positions.data<int32_t>();
  p.slots = slots.data<int64_t>();

  PQ_CHECK(check.op, q_norm.has_value() == k_norm.has_value(),
           "k_norm: expected with q_norm or without it, got only one of the two");
  p.q_norm = take_norm(check, q_norm, "q_norm", dim, device, &p.norm_dtype);
  if (k_norm) check.dtype(*k_norm, "k_norm", q_norm->dtype);
  p.k_norm = take_norm(check, k_norm, "k_norm", dim, device, &p.norm_dtype);
  PQ_CHECK(check.op, eps >= 0.0, "eps: expected 0 or more, got ", eps);
  p.eps = eps;
  take_rotation(check, signs, rotation_size, "rotation_size", dim, device, &p.signs, &p.sign_size);
  p.rotation_size = static_cast<int>(rotation_size);
  p.k_shift = take_shift(check, k_shift, "k_shift", p.kv_heads, dim, device);
  if (kv_bits < 16) {
    p.k_scale = take_head_scale(check, k_scale, "k_scale", p.kv_heads, device);
    p.v_scale = take_head_scale(check, v_scale, "v_scale", p.kv_heads, device);
  }
  p.cache_dtype = kv_dtype(check, k_cache, "k_cache");
  p.k_cache = k_cache.ptr;
  p.v_cache = v_cache.ptr;
  p.page_size = checked_size(check, "k_cache", k_cache.size(2));
  check.on_cuda(q, "q", device);
  check.dtype(q, "q", qkv.dtype);
  check.rank(q, "q", 3);
  check.size(q, "q", 0, p.tokens);
  check.size(q, "q", 1, heads);
  check.size(q, "q", 2, dim);
  check.contiguous(q, "q");
  p.q = q.ptr;
  if (p.tokens == 0) return;
  PQ_CHECK(check.op, p.page_size > 0, "k_cache: expected at least one row in a page, got shape ",
           k_cache.shape_text());
  launch_rope_kv_append(p, device_info_of(device), as_cuda_stream(stream));
}

void kv_quantize_cuda(const std::string& op, const TensorView& x, const TensorView& scale,
                      int64_t bits, const OptionalTensor& signs, int64_t block_size,
                      const OptionalTensor& shift, const TensorView& cache, int64_t position,
                      uintptr_t stream) {
  const ArgumentChecker check{op.c_str()};
  const int device = x.device;
  check.on_cuda(x, "x", device);
  check.floating(x, "x");
  check.rank(x, "x", 4);
  check_last_contiguous(check, x, "x");
  check_bits(check, bits);
  const int64_t dim = x.size(3);
  PQ_CHECK(check.op, dim >= 1 && dim <= kMaxDim && (bits == 8 || dim % 2 == 0),
           "x: expected a last dimension of 1 to ", kMaxDim, ", even for 4 bits, got shape ",
           x.shape_text());
  KvRowsParams p;
  p.scale = take_head_scale(check, scale, "scale", x.size(1), device);
  take_rotation(check, signs, block_size, "block_size", dim, device, &p.signs, &p.sign_size);
  p.rotation_size = static_cast<int>(block_size);
  p.shift = take_shift(check, shift, "shift", x.size(1), dim, device);
  take_cache(check, cache, "cache", bits, device, p.cache_strides);
  check.size(cache, "cache", 0, x.size(0));
  check.size(cache, "cache", 1, x.size(1));
  check.size(cache, "cache", 3, bits == 4 ? dim / 2 : dim);
  PQ_CHECK(check.op, position >= 0 && position + x.size(2) <= cache.size(2), "position: expected ",
           x.size(2), " rows from position on to fit into cache ", cache.shape_text(), ", got ",
           position);
  p.x = x.ptr;
  p.x_dtype = kv_dtype(check, x, "x");
  for (int i = 0; i < 3; ++i) p.x_strides[i] = x.stride(i);
  p.cache = cache.data<uint8_t>() + position * p.cache_strides[2];
  p.cache_dtype = bits == 4 ? KvDtype::kInt4 : KvDtype::kInt8;
  p.batch = checked_size(check, "x", x.size(0));
  p.heads = checked_size(check, "x", x.size(1));
  p.tokens = checked_size(check, "x", x.size(2));
  p.dim = static_cast<int>(dim);
  launch_kv_quantize(p, as_cuda_stream(stream));
}

void kv_dequantize_cuda(const TensorView& q, const OptionalTensor& scale, int64_t bits,
                        const OptionalTensor& block_table, const TensorView& y, uintptr_t stream) {
  const ArgumentChecker check{"kv_dequantize"};
  const int device = q.device;
  KvRowsParams p;
  PQ_CHECK(check.op, bits == 4 || bits == 8 || bits == 16, "bits: expected 4 or 8, got ", bits);
  take_cache(check, q, "q", bits, device, p.cache_strides);
  check.on_cuda(y, "y", device);
  check.floating(y, "y");
  check.rank(y, "y", 4);
  check_last_contiguous(check, y, "y");
  check.size(y, "y", 1, q.size(1));
  check.size(y, "y", 3, bits == 4 ? 2 * q.size(3) : q.size(3));
  if (bits == 16) {
    check.dtype(y, "y", q.dtype);
  } else {
    p.scale = take_head_scale(check, scale, "scale", q.size(1), device);
  }
  if (block_table) {
    p.block_table = take_block_table(check, *block_table, y.size(0), device);
    p.block_table_stride = block_table->stride(0);
    p.page_size = checked_size(check, "q", q.size(2));
    PQ_CHECK(check.op, y.size(2) <= block_table->size(1) * q.size(2), "y: expected at most ",
             block_table->size(1) * q.size(2), " rows, got shape ", y.shape_text());
  } else {
    PQ_CHECK(check.op, y.size(0) <= q.size(0) && y.size(2) <= q.size(2),
             "y: expected at most the batch and the rows of q ", q.shape_text(), ", got shape ",
             y.shape_text());
  }
  p.x = y.ptr;
  p.x_dtype = kv_dtype(check, y, "y");
  for (int i = 0; i < 3; ++i) p.x_strides[i] = y.stride(i);
  p.cache = q.data<uint8_t>();
  p.cache_dtype = kv_dtype(check, q, "q");
  p.batch = checked_size(check, "y", y.size(0));
  p.heads = checked_size(check, "y", y.size(1));
  p.tokens = checked_size(check, "y", y.size(2));
  p.dim = checked_size(check, "y", y.size(3));
  launch_kv_dequantize(p, as_cuda_stream(stream));
}

}  // namespace prefixquant
