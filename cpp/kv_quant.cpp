// SPDX-License-Identifier: Apache-2.0
// kv_quantize, kv_append, kv_dequantize: keys or values with one symmetric scale a head.
//   q = clamp(rint((H x - shift[h]) * (1 / scale[h]))), H a Hadamard over the head dimension or
//   nothing, shift 0 where it is absent.
//   x [B, H, T, D] floating, D contiguous, any other strides; scale float32 [H]; shift float32
//   [H, D];
//   bits 4: q uint8 [B, H, T, D/2], the even index in the low nibble; bits 8: q int8 [B, H, T, D].
//   kv_append writes rows position .. position + T - 1 of a cache [B, H, S, D/2 or D].
//   kv_dequantize: y = float(q) * scale[h], rounded to y's dtype.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using KvKernel = void(const KvRows&, int64_t row_begin, int64_t row_end, float* scratch);
PQ_KERNEL_TABLE(KvKernel, kv_quantize_rows);
PQ_KERNEL_TABLE(KvKernel, kv_dequantize_rows);

namespace {

void check_last_dim_contiguous(const ArgumentChecker& check, const TensorView& t,
                               const char* name) {
  PQ_CHECK(check.op, t.size(-1) <= 1 || t.stride(-1) == 1, name,
           ": expected a contiguous last dimension, got shape ", t.shape_text(), " with stride ",
           t.stride(-1), " there");
}

void check_scale(const ArgumentChecker& check, const TensorView& scale, int64_t heads) {
  check.on_cpu(scale, "scale");
  check.dtype(scale, "scale", DType::kFloat32);
  check.rank(scale, "scale", 1);
  check.size(scale, "scale", 0, heads);
  check.contiguous(scale, "scale");
}

void check_bits(const ArgumentChecker& check, int64_t bits) {
  PQ_CHECK(check.op, bits == 4 || bits == 8, "bits: expected 4 or 8, got ", bits);
}

// A quantized tensor of `dim` values a row in [B, H, any, D/2 or D].
void check_cache(const ArgumentChecker& check, const TensorView& q, const char* name,
                 int64_t bits) {
  check.on_cpu(q, name);
  check.dtype(q, name, bits == 4 ? DType::kUInt8 : DType::kInt8);
  check.rank(q, name, 4);
  check_last_dim_contiguous(check, q, name);
}

void copy_strides(const TensorView& t, int64_t (&strides)[3]) {
  for (int i = 0; i < 3; ++i) strides[i] = t.strides[i];
}

int64_t rows_of(const TensorView& t) { return t.size(0) * t.size(1) * t.size(2); }

void quantize_into(const ArgumentChecker& check, const TensorView& x, const TensorView& scale,
                   int64_t bits, const OptionalTensor& signs, int64_t block_size,
                   const OptionalTensor& shift, const TensorView& cache, const char* cache_name,
                   int64_t position) {
  check.on_cpu(x, "x");
  KvRows params{};
  params.x_type = float_type(check, x, "x");
  check.rank(x, "x", 4);
  check_last_dim_contiguous(check, x, "x");
  check_bits(check, bits);
  PQ_CHECK(check.op, x.size(3) >= 1 && (bits == 8 || x.size(3) % 2 == 0),
           "x: expected a last dimension of at least 1, even for 4 bits, got shape ",
           x.shape_text());
  check_scale(check, scale, x.size(1));
  params.hadamard = hadamard_params(check, signs, block_size);
  PQ_CHECK(check.op, block_size == 1 || block_size == x.size(3),
           "block_size: expected 1 or the last dimension of x ", x.shape_text(), ", got ",
           block_size);
  params.shift = head_shift(check, shift, "shift", x.size(1), x.size(3));
  check_cache(check, cache, cache_name, bits);
  check.size(cache, cache_name, 0, x.size(0));
  check.size(cache, cache_name, 1, x.size(1));
  check.size(cache, cache_name, 3, bits == 4 ? x.size(3) / 2 : x.size(3));
  PQ_CHECK(check.op, position >= 0 && position + x.size(2) <= cache.size(2), "position: expected ",
           x.size(2), " rows from position on to fit into ", cache_name, " ", cache.shape_text(),
           ", got ", position);

  params.heads = x.size(1);
  params.tokens = x.size(2);
  params.dim = x.size(3);
  params.bits = static_cast<int>(bits);
  params.x = x.ptr;
  copy_strides(x, params.x_strides);
  params.q = cache.data<uint8_t>() + position * cache.stride(2);  // one byte an element
  copy_strides(cache, params.q_strides);
  params.scale = scale.data<float>();
  const auto kernel = kv_quantize_rows_table.pick();
  for_row_ranges(
      rows_of(x), params.dim * (4 + params.hadamard.k), 3 * (params.dim + 16),
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

}  // namespace

void kv_quantize(const TensorView& x, const TensorView& scale, int64_t bits,
                 const OptionalTensor& signs, int64_t block_size, const OptionalTensor& shift,
                 const TensorView& q) {
  const ArgumentChecker check{"kv_quantize"};
  quantize_into(check, x, scale, bits, signs, block_size, shift, q, "q", 0);
}

void kv_append(const TensorView& x, const TensorView& scale, int64_t bits,
               const OptionalTensor& signs, int64_t block_size, const OptionalTensor& shift,
               const TensorView& cache, int64_t position) {
  const ArgumentChecker check{"kv_append"};
  quantize_into(check, x, scale, bits, signs, block_size, shift, cache, "cache", position);
}

void kv_dequantize(const TensorView& q, const TensorView& scale, int64_t bits,
                   const TensorView& y) {
  const ArgumentChecker check{"kv_dequantize"};
  check_bits(check, bits);
  check_cache(check, q, "q", bits);
  check_scale(check, scale, q.size(1));
  KvRows params{};
  check.on_cpu(y, "y");
  params.y_type = float_type(check, y, "y");
  check.rank(y, "y", 4);
  check.contiguous(y, "y");
  for (int i = 0; i < 3; ++i) check.size(y, "y", i, q.size(i));
  check.size(y, "y", 3, bits == 4 ? 2 * q.size(3) : q.size(3));

  params.heads = q.size(1);
  params.tokens = q.size(2);
  params.dim = y.size(3);
  params.bits = static_cast<int>(bits);
  params.q = q.data<uint8_t>();
  copy_strides(q, params.q_strides);
  params.scale = scale.data<float>();
  params.y = y.ptr;
  const auto kernel = kv_dequantize_rows_table.pick();
  for_row_ranges(
      rows_of(q), 2 * params.dim, params.dim + 16,
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

}  // namespace prefixquant
