// SPDX-License-Identifier: Apache-2.0
// Operands of the KV attention on the device, with everything that must not be read poisoned, and
// its result in float64 by the plainest kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "prefixquant/check.h"
#include "prefixquant/kv_attention.h"

namespace prefixquant::bench {

struct KvProblem {
  std::string name;
  KvDtype cache = KvDtype::kInt4;
  KvDtype q = KvDtype::kBFloat16;
  int dim = 128, kv_heads = 8, group = 4, tokens = 1, prefix = 1;
  int page_size = 0;    // 0: contiguous
  int spare_rows = 37;  // of a contiguous cache beyond the longest sequence
  bool mask = false, quantize = false;
  KvDtype prefix_dtype = KvDtype::kBFloat16;
  std::vector<int> lengths;
  std::vector<int> early_lengths;  // what a launch finds before the kernel ahead has ended
  int copies = 1;                  // caches to rotate through
};

inline int bits_of(KvDtype dtype) {
  return dtype == KvDtype::kInt4 ? 4 : dtype == KvDtype::kInt8 ? 8 : 16;
}

// ---- device helpers ----

__device__ inline uint32_t hash32(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  x ^= x >> 31;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 29;
  x *= 0x94D049BB133111EBull;
  return static_cast<uint32_t>(x >> 32);
}

__device__ inline float gaussian(uint64_t i, uint32_t seed) {
  const float u = (hash32(2 * i, seed) + 1.0f) * 2.3283064e-10f;
  const float v = hash32(2 * i + 1, seed) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

__device__ inline double read_value(const void* from, KvDtype dtype, int64_t i) {
  switch (dtype) {
    case KvDtype::kInt4: {
      const int nibble = static_cast<const uint8_t*>(from)[i / 2] >> (i % 2 * 4) & 15;
      return (nibble ^ 8) - 8;
    }
    case KvDtype::kInt8:
      return static_cast<const int8_t*>(from)[i];
    case KvDtype::kFloat16:
      return __half2float(static_cast<const __half*>(from)[i]);
    case KvDtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}

__device__ inline void write_float(void* to, KvDtype dtype, int64_t i, float x) {
  if (dtype == KvDtype::kFloat16) static_cast<__half*>(to)[i] = __float2half(x);
  if (dtype == KvDtype::kBFloat16) static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(x);
  if (dtype == KvDtype::kFloat32) static_cast<float*>(to)[i] = x;
}

static __global__ void fill_gaussian(void* to, KvDtype dtype, int64_t count, float scale,
                                     uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    write_float(to, dtype, i, scale * gaussian(i, seed));
  }
}

// Rows that sequences attend get values (integers of about 2.7 sigma in the range), others stay.
static __global__ void fill_cache(uint8_t* to, KvAttentionGpuParams p, const int* lengths, int dim,
                                  uint32_t seed, const int64_t* strides) {
  const int b = blockIdx.x, head = blockIdx.y;
  const int bits = p.cache_dtype == KvDtype::kInt4 ? 4 : p.cache_dtype == KvDtype::kInt8 ? 8 : 16;
  for (int64_t i = threadIdx.x; i < int64_t{lengths[b]} * dim; i += blockDim.x) {
    const int row = i / dim, d = i % dim;
    const int64_t page =
        p.block_table ? p.block_table[b * p.block_table_stride + row / p.page_size] : b;
    const int64_t in_page = p.block_table ? row % p.page_size : row;
    uint8_t* at = to + page * strides[0] + head * strides[1] + in_page * (dim * bits / 8);
    const float x = gaussian((int64_t{b} * gridDim.y + head) * (int64_t{1} << 34) + i, seed);
    if (bits == 16) write_float(at, p.cache_dtype, d, x);
    if (bits == 8) reinterpret_cast<int8_t*>(at)[d] = max(-128, min(127, __float2int_rn(x * 47)));
    if (bits == 4 && d % 2 == 0) {
      const float y = gaussian((int64_t{b} * gridDim.y + head) * (int64_t{1} << 34) + i + 1, seed);
      const int low = max(-8, min(7, __float2int_rn(x * 2.6f)));
      const int high = max(-8, min(7, __float2int_rn(y * 2.6f)));
      at[d / 2] = (low & 15) | (high & 15) << 4;
    }
  }
}

// One block per (b, token, query head); logits go through `scratch` [blocks, P + max_length].
static __global__ void reference_kernel(KvAttentionGpuParams p, const int* lengths, double* scratch,
                                        double* out, bool round_probabilities) {
  const int hq = blockIdx.x % (p.kv_heads * p.group), head = hq / p.group;
  const int token = blockIdx.x / (p.kv_heads * p.group) % p.tokens;
  const int b = blockIdx.x / (p.kv_heads * p.group) / p.tokens;
  const int length = lengths[b], total = p.prefix + length;
  const int limit = p.mask ? length : length - (p.tokens - 1) + token;
  const int bits = p.cache_dtype == KvDtype::kInt4 ? 4 : p.cache_dtype == KvDtype::kInt8 ? 8 : 16;
  double* s = scratch + int64_t{blockIdx.x} * (p.prefix + p.max_length);
  const auto row_of = [&](const uint8_t* cache, const int64_t* strides, int row) {
    const int64_t page =
        p.block_table ? p.block_table[b * p.block_table_stride + row / p.page_size] : b;
    const int64_t in_page = p.block_table ? row % p.page_size : row;
    return cache + page * strides[0] + head * strides[1] + in_page * (p.dim * bits / 8);
  };
  __shared__ double top, sum;
  for (int j = threadIdx.x; j < total; j += blockDim.x) {
    const int row = j - p.prefix;
    const int64_t q_at = b * p.q_strides[0] + token * p.q_strides[1] + hq * p.q_strides[2];
    const uint8_t* at = row < 0 ? nullptr : row_of(p.k, p.k_strides, row);
    double dot = 0;
    for (int d = 0; d < p.dim; ++d) {
      const double k = row < 0 ? read_value(p.prefix_k, p.prefix_dtype,
                                            (int64_t{head} * p.prefix + j) * p.dim + d)
                               : read_value(at, p.cache_dtype, d);
      dot += read_value(p.q, p.q_dtype, q_at + d) * k;
    }
    if (row >= 0 && p.k_scale) dot *= p.k_scale[head];
    bool seen = row < limit;
    if (p.mask && row >= 0) {
      seen = p.mask[b * p.mask_strides[0] + token * p.mask_strides[1] + row * p.mask_strides[2]];
    }
    s[j] = seen ? dot * p.scaling : -INFINITY;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    top = -INFINITY;
    for (int j = 0; j < total; ++j) top = max(top, s[j]);
    sum = 0;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < total; j += blockDim.x) {
    s[j] = s[j] == -INFINITY ? 0 : exp(s[j] - top);
    atomicAdd(&sum, s[j]);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.dim; d += blockDim.x) {
    double o = 0;
    for (int j = 0; j < total; ++j) {
      const int row = j - p.prefix;
      if (s[j] == 0) continue;
      // What a 16-bit attention does: probabilities and dequantized values in bfloat16.
      double v = row < 0 ? read_value(p.prefix_v, p.prefix_dtype,
                                      (int64_t{head} * p.prefix + j) * p.dim + d)
                         : read_value(row_of(p.v, p.v_strides, row), p.cache_dtype, d) *
                               (p.v_scale ? p.v_scale[head] : 1.0f);
      double probability = s[j];
      if (round_probabilities) {
        v = __bfloat162float(__float2bfloat16(v));
        probability = __bfloat162float(__float2bfloat16(probability));
      }
      o += probability * v;
    }
    out[int64_t{blockIdx.x} * p.dim + d] = sum > 0 ? o / sum : 0;
  }
}

// ---- host side ----

template <typename T>
T* device_array(size_t count, int poison) {
  T* pointer = nullptr;
  PQ_CUDA_CHECK(
      cudaMalloc(reinterpret_cast<void**>(&pointer), std::max<size_t>(count, 1) * sizeof(T)));
  PQ_CUDA_CHECK(cudaMemset(pointer, poison, std::max<size_t>(count, 1) * sizeof(T)));
  return pointer;
}

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* pointer = device_array<T>(host.size(), 0);
  PQ_CUDA_CHECK(cudaMemcpy(pointer, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return pointer;
}

// The operands of a problem; `params[i]` uses cache copy i. Freed when it goes out of scope.
struct KvOperands {
  std::vector<KvAttentionGpuParams> params;
  std::vector<void*> owned;
  int* lengths = nullptr;
  int64_t read_bytes = 0;  // of K and V, one launch
  int64_t out_count = 0;
  int out_bytes = 2;

  template <typename T>
  T* own(T* pointer) {
    owned.push_back(pointer);
    return pointer;
  }
  KvOperands(const KvProblem& problem, int sm_count);
  ~KvOperands() {
    for (void* pointer : owned) cudaFree(pointer);
  }
  KvOperands(const KvOperands&) = delete;
};

inline KvOperands::KvOperands(const KvProblem& problem, int sm_count) {
  const int batch = static_cast<int>(problem.lengths.size()), bits = bits_of(problem.cache);
  const int heads = problem.kv_heads * problem.group, dim = problem.dim;
  int longest = 0;
  for (int length : problem.early_lengths) longest = std::max(longest, length);
  for (int length : problem.lengths) longest = std::max(longest, length);
  const int64_t row_bytes = dim * bits / 8;
  lengths = own(to_device(problem.lengths));

  KvAttentionGpuParams p;
  p.batch = batch, p.tokens = problem.tokens, p.kv_heads = problem.kv_heads;
  p.group = problem.group, p.dim = dim, p.prefix = problem.prefix;
  p.scaling = 1.0f / std::sqrt(static_cast<float>(dim));
  p.cache_dtype = problem.cache;
  p.q_dtype = bits == 16 ? problem.cache : problem.q;
  p.prefix_dtype = problem.prefix_dtype;
  p.max_length = longest;
  p.lengths = lengths;

  const int64_t q_count = int64_t{batch} * problem.tokens * heads * dim;
  p.q = own(device_array<uint16_t>(q_count, 0xFF));
  p.q_strides[0] = int64_t{problem.tokens} * heads * dim, p.q_strides[1] = int64_t{heads} * dim;
  p.q_strides[2] = dim;
  fill_gaussian<<<256, 256>>>(const_cast<void*>(p.q), p.q_dtype, q_count, 2.0f, 1);
  const int64_t prefix_count = int64_t{problem.kv_heads} * problem.prefix * dim;
  p.prefix_k = own(device_array<float>(prefix_count, 0xFF));
  p.prefix_v = own(device_array<float>(prefix_count, 0xFF));
  fill_gaussian<<<64, 256>>>(const_cast<void*>(p.prefix_k), p.prefix_dtype, prefix_count, 1.0f, 2);
  fill_gaussian<<<64, 256>>>(const_cast<void*>(p.prefix_v), p.prefix_dtype, prefix_count, 1.0f, 3);
  if (bits < 16) {
    std::vector<float> scale(problem.kv_heads);
    for (int h = 0; h < problem.kv_heads; ++h)
      scale[h] = (bits == 4 ? 0.37f : 0.021f) * (1 + h % 3);
    p.k_scale = own(to_device(scale));
    p.v_scale = own(to_device(scale));
  }

  int pages = batch, capacity = longest + problem.spare_rows;
  p.page_size = capacity;
  if (problem.page_size > 0) {
    p.page_size = capacity = problem.page_size;
    const int per_sequence = (longest + p.page_size - 1) / p.page_size + 2;
    pages = 0;
    for (int length : problem.lengths) pages += (length + p.page_size - 1) / p.page_size;
    pages += 3;
    std::vector<int32_t> table(size_t(batch) * per_sequence, 0x7FFFFFFF), order(pages);
    for (int i = 0; i < pages; ++i) order[i] = i;
    for (int i = pages - 1; i > 0; --i) std::swap(order[i], order[std::rand() % (i + 1)]);
    int next = 0;
    for (int b = 0; b < batch; ++b) {
      for (int i = 0; i * p.page_size < problem.lengths[b]; ++i) {
        table[size_t(b) * per_sequence + i] = order[next++];
      }
      if (next < pages) table[(size_t(b) + 1) * per_sequence - 1] = -1;
    }
    p.block_table = own(to_device(table));
    p.block_table_stride = per_sequence;
  }
  p.pages = pages;
  p.k_strides[0] = p.v_strides[0] = problem.kv_heads * int64_t{capacity} * row_bytes;
  p.k_strides[1] = p.v_strides[1] = int64_t{capacity} * row_bytes;
  const int64_t* strides = own(to_device(std::vector<int64_t>{p.k_strides[0], p.k_strides[1]}));
  if (problem.mask) {
    std::vector<uint8_t> mask(size_t(batch) * problem.tokens * longest);
    for (auto& m : mask) m = std::rand() % 3 != 0;
    p.mask = own(to_device(mask));
    p.mask_strides[0] = int64_t{problem.tokens} * longest, p.mask_strides[1] = longest;
    p.mask_strides[2] = 1;
  }
  out_count = q_count;
  out_bytes = problem.quantize ? 1 : 2;
  p.out = own(device_array<uint16_t>(q_count, 0xFF));
  if (problem.quantize) p.output_scale = own(to_device(std::vector<float>{0.05f}));
  const KvAttentionWorkspace sizes = kv_attention_workspace(p, sm_count);
  p.counters = own(device_array<uint8_t>(sizes.counter_bytes, 0));
  p.partials = own(device_array<uint8_t>(sizes.partial_bytes, 0xFF));
  for (int i = 0; i < problem.copies; ++i) {
    const size_t bytes = size_t(pages) * p.k_strides[0];
    uint8_t* k = own(device_array<uint8_t>(bytes, 0xFF));
    uint8_t* v = own(device_array<uint8_t>(bytes, 0xFF));
    p.k = k, p.v = v;
    const dim3 grid(batch, problem.kv_heads);
    fill_cache<<<grid, 512>>>(k, p, lengths, dim, 10 + 2 * i, strides);
    fill_cache<<<grid, 512>>>(v, p, lengths, dim, 11 + 2 * i, strides);
    params.push_back(p);
  }
  for (int length : problem.lengths) read_bytes += 2 * problem.kv_heads * length * row_bytes;
  PQ_CUDA_CHECK(cudaDeviceSynchronize());
}

struct KvError {
  double ours = 0,
         rounded = 0;  // largest error of ours, of bfloat16 operands and a bfloat16 result
  bool finite = true;
};

// Error of what a launch with params[copy] left in `out`.
inline KvError check_output(const KvOperands& operands, int copy) {
  const KvAttentionGpuParams& p = operands.params[copy];
  const int blocks = p.batch * p.tokens * p.kv_heads * p.group;
  double* scratch = device_array<double>(size_t(blocks) * (p.prefix + p.max_length), 0);
  double* exact = device_array<double>(operands.out_count, 0);
  std::vector<double> want(operands.out_count), rounded(operands.out_count);
  for (int round = 0; round < 2; ++round) {
    reference_kernel<<<blocks, 128>>>(p, operands.lengths, scratch, exact, round == 1);
    PQ_CUDA_CHECK(cudaMemcpy((round ? rounded : want).data(), exact,
                             operands.out_count * sizeof(double), cudaMemcpyDeviceToHost));
  }
  PQ_CUDA_CHECK(cudaFree(scratch));
  PQ_CUDA_CHECK(cudaFree(exact));
  std::vector<uint8_t> raw(operands.out_count * operands.out_bytes);
  PQ_CUDA_CHECK(cudaMemcpy(raw.data(), p.out, raw.size(), cudaMemcpyDeviceToHost));
  KvError error;
  for (int64_t i = 0; i < operands.out_count; ++i) {
    double got;
    if (operands.out_bytes == 1) {
      const double q = std::rint(want[i] / 0.05);
      want[i] = std::min(127.0, std::max(-128.0, q));
      got = static_cast<int8_t>(raw[i]);
      error.rounded = 0.5;  // one level either way, at a rounding tie
    } else {
      const uint16_t bits = raw[2 * i] | raw[2 * i + 1] << 8;
      __half_raw half{bits};
      __nv_bfloat16_raw bfloat{bits};
      got = p.q_dtype == KvDtype::kFloat16 ? __half2float(__half(half))
                                           : __bfloat162float(__nv_bfloat16(bfloat));
      const double back = __bfloat162float(__float2bfloat16(static_cast<float>(rounded[i])));
      error.rounded = std::max(error.rounded, std::abs(back - want[i]));
    }
    if (!std::isfinite(got)) {
      error.finite = false;
      continue;
    }
    error.ours = std::max(error.ours, std::abs(got - want[i]));
  }
  return error;
}

}  // namespace prefixquant::bench
