// SPDX-License-Identifier: Apache-2.0
// Rows of floats to rows of a KV cache and back; see kv_quant.h.
// quantize:   a warp takes one row at a time (head_row.cuh), grid-stride.
// dequantize: a thread takes 16 bytes of output at a time, coalesced on both sides.
#include "prefixquant/kv_quant.h"

#include <algorithm>
#include <cmath>

#include "prefixquant/check.h"
#include "prefixquant/head_row.cuh"

namespace prefixquant {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxDim = 1024;
constexpr int kMaxGrid = 1 << 20;  // beyond it CTAs walk on

struct RowAt {
  int b, h, t;
  __device__ __forceinline__ RowAt(const KvRowsParams& p, int64_t row)
      : b(static_cast<int>(row / p.tokens / p.heads)),
        h(static_cast<int>(row / p.tokens % p.heads)),
        t(static_cast<int>(row % p.tokens)) {}
  __device__ __forceinline__ int64_t offset(const int64_t (&strides)[3]) const {
    return b * strides[0] + h * strides[1] + t * strides[2];
  }
};

template <typename T, typename Row>
__global__ void __launch_bounds__(32 * kWarps)
    kv_quantize_kernel(const __grid_constant__ KvRowsParams p, HeadRotation rotation) {
  extern __shared__ float smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.tokens;
  Row row(smem + warp * 2 * p.dim, p.dim, lane);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp; i < rows;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const RowAt at(p, i);
    const T* from = static_cast<const T*>(p.x) + at.offset(p.x_strides);
    row.take(row.fetch(from), from);
    if (rotation.size > 1) row.rotate(rotation);
    if (p.shift != nullptr) row.subtract(p.shift + static_cast<int64_t>(at.h) * p.dim);
    store_cached(row, p.cache_dtype, p.cache + at.offset(p.cache_strides), p.scale + at.h);
  }
}

// kChannels: 8 where rows are cut into aligned pieces, else 1 (two nibbles share a byte: 2).
template <typename T, KvDtype kCache, int kChannels>
__global__ void __launch_bounds__(256)
    kv_dequantize_kernel(const __grid_constant__ KvRowsParams p) {
  const int pieces = p.dim / kChannels;
  const int64_t count = static_cast<int64_t>(p.batch) * p.heads * p.tokens * pieces;
  constexpr int kBytes = kCache == KvDtype::kInt4   ? kChannels / 2
                         : kCache == KvDtype::kInt8 ? kChannels
                                                    : kChannels * static_cast<int>(sizeof(T));
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * 256) {
    const RowAt at(p, i / pieces);
    const int channel = static_cast<int>(i % pieces) * kChannels;
    int64_t page = at.b, in_page = at.t;
    if (p.block_table != nullptr) {
      page = p.block_table[at.b * p.block_table_stride + at.t / p.page_size];
      in_page = at.t % p.page_size;
    }
    const uint8_t* from = p.cache + page * p.cache_strides[0] + at.h * p.cache_strides[1] +
                          in_page * p.cache_strides[2] +
                          static_cast<int64_t>(channel) * kBytes / kChannels;
    T* to = static_cast<T*>(p.x) + at.offset(p.x_strides) + channel;
    const Bytes<kBytes> raw = *reinterpret_cast<const Bytes<kBytes>*>(from);
    if constexpr (kCache != KvDtype::kInt4 && kCache != KvDtype::kInt8) {
      *reinterpret_cast<Bytes<kBytes>*>(to) = raw;
    } else {
      const float scale = p.scale[at.h];
      alignas(16) T y[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        int q;
        if constexpr (kCache == KvDtype::kInt4) {
          q = static_cast<int>(static_cast<uint32_t>(raw.at[c / 2]) << (c % 2 ? 24 : 28)) >> 28;
        } else {
          q = static_cast<int8_t>(raw.at[c]);
        }
        from_float(__fmul_rn(static_cast<float>(q), scale), y[c]);
      }
      using Out = Bytes<std::min<int>(16, kChannels * sizeof(T))>;
#pragma unroll
      for (int c = 0; c < static_cast<int>(kChannels * sizeof(T) / sizeof(Out)); ++c) {
        reinterpret_cast<Out*>(to)[c] = reinterpret_cast<const Out*>(y)[c];
      }
    }
  }
}

int64_t bytes_of(KvDtype dtype) {
  return dtype == KvDtype::kFloat32 ? 4 : dtype == KvDtype::kInt8 ? 1 : 2;
}

// Whether all rows of x and of the cache begin at multiples of these bytes.
bool aligned(const KvRowsParams& p, int64_t x_bytes, int64_t cache_bytes) {
  uint64_t x = reinterpret_cast<uintptr_t>(p.x), cache = reinterpret_cast<uintptr_t>(p.cache);
  for (int i = 0; i < 3; ++i) {
    x |= static_cast<uint64_t>(p.x_strides[i] * bytes_of(p.x_dtype));
    cache |= static_cast<uint64_t>(p.cache_strides[i]);
  }
  return x % x_bytes == 0 && cache % cache_bytes == 0;
}

unsigned grid_of(int64_t work, int each) {
  return static_cast<unsigned>(std::min<int64_t>(kMaxGrid, (work + each - 1) / each));
}

template <typename T, typename Row>
void quantize_rows(const KvRowsParams& p, const HeadRotation& rotation, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.tokens;
  const size_t smem = Row::kShared ? kWarps * 2 * p.dim * sizeof(float) : 0;
  kv_quantize_kernel<T, Row><<<grid_of(rows, kWarps), 32 * kWarps, smem, stream>>>(p, rotation);
  PQ_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void quantize_dtype(const KvRowsParams& p, cudaStream_t stream) {
  const HeadRotation rotation{
      p.signs, p.sign_size, p.rotation_size,
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.rotation_size)))};
  const int64_t lane = p.dim / 32;
  const bool in_registers =
      p.sign_size == 1 && p.dim % 64 == 0 && reinterpret_cast<uintptr_t>(p.shift) % 16 == 0 &&
      aligned(p, std::min<int64_t>(16, lane * static_cast<int64_t>(sizeof(T))),
              p.cache_dtype == KvDtype::kInt4 ? lane / 2 : lane);
  if (in_registers && p.dim == 64) return quantize_rows<T, RegisterRow<64>>(p, rotation, stream);
  if (in_registers && p.dim == 128) return quantize_rows<T, RegisterRow<128>>(p, rotation, stream);
  if (in_registers && p.dim == 256) return quantize_rows<T, RegisterRow<256>>(p, rotation, stream);
  quantize_rows<T, SharedRow>(p, rotation, stream);
}

template <typename T, KvDtype kCache, int kChannels>
void dequantize_rows(const KvRowsParams& p, cudaStream_t stream) {
  const int64_t pieces = static_cast<int64_t>(p.batch) * p.heads * p.tokens * (p.dim / kChannels);
  kv_dequantize_kernel<T, kCache, kChannels><<<grid_of(pieces, 256), 256, 0, stream>>>(p);
  PQ_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void dequantize_dtype(const KvRowsParams& p, cudaStream_t stream) {
  switch (p.cache_dtype) {
    case KvDtype::kInt4:
      if (p.dim % 8 == 0 && aligned(p, 16, 4))
        return dequantize_rows<T, KvDtype::kInt4, 8>(p, stream);
      PQ_REQUIRE(p.dim % 2 == 0,
                 "kv_dequantize: q: expected an even head dimension, got " << p.dim);
      if (aligned(p, 2 * sizeof(T), 1)) return dequantize_rows<T, KvDtype::kInt4, 2>(p, stream);
      PQ_REQUIRE(false, "kv_dequantize: y: expected rows aligned to two values");
      return;
    case KvDtype::kInt8:
      if (p.dim % 8 == 0 && aligned(p, 16, 8))
        return dequantize_rows<T, KvDtype::kInt8, 8>(p, stream);
      return dequantize_rows<T, KvDtype::kInt8, 1>(p, stream);
    default:
      PQ_REQUIRE(p.cache_dtype == p.x_dtype, "kv_dequantize: dtype: expected that of the cache");
      constexpr int kVector = 16 / sizeof(T);
      if (p.dim % kVector == 0 && aligned(p, 16, 16)) {
        return dequantize_rows<T, KvDtype::kFloat16, kVector>(p, stream);
      }
      return dequantize_rows<T, KvDtype::kFloat16, 1>(p, stream);
  }
}

template <typename Run>
void with_dtype(const char* op, KvDtype dtype, Run&& run) {
  if (dtype == KvDtype::kFloat16) return run(__half{});
  if (dtype == KvDtype::kBFloat16) return run(__nv_bfloat16{});
  PQ_REQUIRE(dtype == KvDtype::kFloat32, op << ": expected a floating dtype");
  run(float{});
}

}  // namespace

void launch_kv_quantize(const KvRowsParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return;
  PQ_REQUIRE(p.dim > 0 && p.dim <= kMaxDim, "kv_quantize: x: expected a head dimension of at most "
                                                << kMaxDim << ", got " << p.dim);
  with_dtype("kv_quantize: x", p.x_dtype,
             [&](auto type) { quantize_dtype<decltype(type)>(p, stream); });
}

void launch_kv_dequantize(const KvRowsParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return;
  with_dtype("kv_dequantize: dtype", p.x_dtype,
             [&](auto type) { dequantize_dtype<decltype(type)>(p, stream); });
}

}  // namespace prefixquant
