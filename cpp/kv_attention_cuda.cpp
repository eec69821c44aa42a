// SPDX-License-Identifier: Apache-2.0
// Checks and launches of attention over a KV cache on the GPU (kv_attention, kv_decode_attention,
// kv_prefill_attention): one kernel, which python/prefixquant/ops/kv_attention_cuda.py calls with
// q as [B, T, Hq, D]. Interface: cuda/include/prefixquant/kv_attention.h.
#include "prefixquant/kv_attention.h"

#include <algorithm>

#include "kv_cuda.h"
#include "ops_cuda.h"

namespace prefixquant {
namespace {

// q and everything that its shape decides.
void take_queries(const ArgumentChecker& check, const TensorView& q, KvAttentionGpuParams& p) {
  check.on_cuda(q, "q", q.device);
  PQ_CHECK(check.op, q.dtype == DType::kFloat16 || q.dtype == DType::kBFloat16,
           "q: expected dtype float16 or bfloat16, got ", dtype_name(q.dtype));
  check.rank(q, "q", 4);
  PQ_CHECK(check.op, kv_attention_supports_dim(static_cast<int>(q.size(3))),
           "q: expected a head dimension of 64, 96, 128 or 256, got shape ", q.shape_text());
  p.q = q.ptr;
  p.q_dtype = kv_dtype(check, q, "q");
  p.batch = checked_size(check, "q", q.size(0));
  p.tokens = checked_size(check, "q", q.size(1));
  p.dim = checked_size(check, "q", q.size(3));
  bool aligned = q.stride(3) == 1 && reinterpret_cast<uintptr_t>(q.ptr) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    p.q_strides[i] = q.stride(i);
    aligned = aligned && (q.size(i) <= 1 || q.stride(i) % 8 == 0);
  }
  PQ_CHECK(check.op, aligned, "q: expected contiguous heads at multiples of 16 bytes, got shape ",
           q.shape_text(), " with other strides");
}

// k or v: strides in bytes.
const uint8_t* take_cache(const ArgumentChecker& check, const TensorView& t, const char* name,
                          const KvAttentionGpuParams& p, int device, int64_t (&strides)[2]) {
  check.on_cuda(t, name, device);
  check.rank(t, name, 4);
  const bool packed = t.dtype == DType::kUInt8;
  check.size(t, name, 3, packed ? p.dim / 2 : p.dim);
  const int64_t bytes = dtype_bytes(t.dtype), row = t.size(3) * bytes;
  strides[0] = t.stride(0) * bytes;
  strides[1] = t.stride(1) * bytes;
  const bool rows_follow = t.stride(3) == 1 && (t.size(2) <= 1 || t.stride(2) * bytes == row);
  PQ_CHECK(check.op,
           rows_follow && reinterpret_cast<uintptr_t>(t.ptr) % 16 == 0 && strides[0] % 16 == 0 &&
               strides[1] % 16 == 0,
           name,
           ": expected contiguous rows that follow each other, heads at multiples of 16 bytes,",
           " got shape ", t.shape_text(), " with other strides");
  return t.data<uint8_t>();
}

void take_prefix(const ArgumentChecker& check, const TensorView& k, const TensorView& v, int device,
                 KvAttentionGpuParams& p) {
  check.on_cuda(k, "prefix_k", device);
  PQ_CHECK(check.op, k.dtype == DType::kFloat16 || k.dtype == DType::kBFloat16,
           "prefix_k: expected dtype float16 or bfloat16, got ", dtype_name(k.dtype));
  check.rank(k, "prefix_k", 3);
  check.size(k, "prefix_k", 0, p.kv_heads);
  check.size(k, "prefix_k", 2, p.dim);
  check.contiguous(k, "prefix_k");
  check.on_cuda(v, "prefix_v", device);
  check.dtype(v, "prefix_v", k.dtype);
  check.same_shape(v, "prefix_v", k, "prefix_k");
  check.contiguous(v, "prefix_v");
  p.prefix = checked_size(check, "prefix_k", k.size(1));
  if (p.prefix == 0) return;
  check.aligned(k, "prefix_k", 16);
  check.aligned(v, "prefix_v", 16);
  p.prefix_k = k.ptr;
  p.prefix_v = v.ptr;
  p.prefix_dtype = kv_dtype(check, k, "prefix_k");
}

void* take_buffer(const ArgumentChecker& check, const TensorView& t, const char* name, int device,
                  size_t needed) {
  check.on_cuda(t, name, device);
  check.contiguous(t, name);
  check.aligned(t, name, 16);
  const int64_t bytes = t.numel() * dtype_bytes(t.dtype);
  PQ_CHECK(check.op, bytes >= static_cast<int64_t>(needed), name, ": expected ", needed,
           " bytes, got ", bytes);
  return t.ptr;
}

}  // namespace

std::pair<int64_t, int64_t> kv_attention_workspace_cuda(int64_t batch, int64_t tokens,
                                                        int64_t heads, int64_t kv_heads,
                                                        int64_t dim, int64_t device) {
  PQ_CHECK("kv_attention_workspace", device >= 0, "device: expected a CUDA device, got ", device);
  KvAttentionGpuParams p;
  p.batch = static_cast<int>(batch);
  p.tokens = static_cast<int>(tokens);
  p.kv_heads = static_cast<int>(kv_heads);
  p.group = kv_heads > 0 ? static_cast<int>(heads / kv_heads) : 0;
  p.dim = static_cast<int>(dim);
  const KvAttentionWorkspace w =
      kv_attention_workspace(p, device_info_of(static_cast<int>(device)).sm_count);
  return {static_cast<int64_t>(w.counter_bytes), static_cast<int64_t>(w.partial_bytes)};
}

void kv_attention_cuda(const std::string& op, const TensorView& q, const TensorView& k,
                       const TensorView& v, const OptionalTensor& k_scale,
                       const OptionalTensor& v_scale, const TensorView& prefix_k,
                       const TensorView& prefix_v, const OptionalTensor& lengths,
                       const OptionalTensor& block_table, const OptionalTensor& mask,
                       int64_t max_length, double scaling, const OptionalTensor& output_scale,
                       int64_t output_bits, const TensorView& out, const TensorView& counters,
                       const TensorView& partials, uintptr_t stream) {
  const ArgumentChecker check{op.c_str()};
  const bool tensors = op == "kv_attention";  // it calls the cache by another name
  const char *const k_name = tensors ? "k" : "k_cache", *const v_name = tensors ? "v" : "v_cache";
  const int device = q.device;
  KvAttentionGpuParams p;
  take_queries(check, q, p);
  p.cache_dtype = kv_dtype(check, k, k_name);
  check.dtype(v, v_name, k.dtype);
  p.k = take_cache(check, k, k_name, p, device, p.k_strides);
  p.v = take_cache(check, v, v_name, p, device, p.v_strides);
  check.same_shape(v, v_name, k, k_name);
  p.kv_heads = checked_size(check, k_name, k.size(1));
  PQ_CHECK(op, p.kv_heads > 0 && q.size(2) % p.kv_heads == 0, k_name,
           ": expected a number of heads that divides the ", q.size(2), " of q, got shape ",
           k.shape_text());
  p.group = static_cast<int>(q.size(2) / p.kv_heads);
  const bool quantized = k.dtype == DType::kUInt8 || k.dtype == DType::kInt8;
  PQ_CHECK(op, quantized || k.dtype == q.dtype, k_name,
           ": expected uint8, int8 or the dtype of q, got ", dtype_name(k.dtype));
  if (quantized) {
    p.k_scale = take_head_scale(check, k_scale, "k_scale", p.kv_heads, device);
    p.v_scale = take_head_scale(check, v_scale, "v_scale", p.kv_heads, device);
  }
  take_prefix(check, prefix_k, prefix_v, device, p);
  p.pages = k.size(0);
  int64_t capacity = k.size(2);
  p.page_size = std::max(1, checked_size(check, k_name, capacity));
  if (block_table) {
    p.block_table = take_block_table(check, *block_table, p.batch, device);
    p.block_table_stride = block_table->stride(0);
    capacity *= block_table->size(1);
  } else {
    PQ_CHECK(op, p.pages >= p.batch, k_name, ": expected a page for each of the ", p.batch,
             " sequences, got shape ", k.shape_text());
  }
  PQ_CHECK(op, max_length >= 0 && max_length <= capacity, "max_length: expected 0 to ", capacity,
           " (the rows of a sequence), got ", max_length);
  p.max_length = checked_size(check, "max_length", max_length);
  if (lengths) {
    check.on_cuda(*lengths, "lengths", device);
    check.dtype(*lengths, "lengths", DType::kInt32);
    check.rank(*lengths, "lengths", 1);
    check.size(*lengths, "lengths", 0, p.batch);
    check.contiguous(*lengths, "lengths");
    p.lengths = lengths->data<int32_t>();
  }
  if (mask) {
    check.on_cuda(*mask, "mask", device);
    check.dtype(*mask, "mask", DType::kBool);
    check.rank(*mask, "mask", 4);
    PQ_CHECK(op, mask->size(0) == p.batch || mask->size(0) == 1, "mask: expected size ", p.batch,
             " or 1 in dimension 0, got shape ", mask->shape_text());
    check.size(*mask, "mask", 1, 1);
    check.size(*mask, "mask", 2, p.tokens);
    check.size(*mask, "mask", 3, max_length);
    p.mask = mask->data<uint8_t>();
    p.mask_strides[0] = mask->size(0) == 1 ? 0 : mask->stride(0);
    p.mask_strides[1] = mask->stride(2);
    p.mask_strides[2] = mask->stride(3);
  }
  p.scaling = static_cast<float>(scaling);
  if (output_scale) {
    check.on_cuda(*output_scale, "output_scale", device);
    check.dtype(*output_scale, "output_scale", DType::kFloat32);
    PQ_CHECK(op, output_scale->numel() == 1, "output_scale: expected one element, got shape ",
             output_scale->shape_text());
    PQ_CHECK(op, output_bits >= 2 && output_bits <= 8, "output_bits: expected 2 to 8, got ",
             output_bits);
    p.output_scale = output_scale->data<float>();
    p.output_qmin = -(1 << (output_bits - 1));
    p.output_qmax = (1 << (output_bits - 1)) - 1;
  }
  check.on_cuda(out, "out", device);
  check.dtype(out, "out", output_scale ? DType::kInt8 : q.dtype);
  check.contiguous(out, "out");
  check.aligned(out, "out", output_scale ? 2 : 4);
  PQ_CHECK(op, out.numel() == q.numel(), "out: expected ", q.numel(), " elements, got shape ",
           out.shape_text());
  if (out.numel() == 0) return;
  p.out = out.ptr;
  const DeviceInfo info = device_info_of(device);
  const KvAttentionWorkspace needed = kv_attention_workspace(p, info.sm_count);
  p.counters = take_buffer(check, counters, "counters", device, needed.counter_bytes);
  p.partials = take_buffer(check, partials, "partials", device, needed.partial_bytes);
  launch_kv_attention(p, info, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace prefixquant
