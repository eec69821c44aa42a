// SPDX-License-Identifier: Apache-2.0
//
// Weight prepack and its inverse (layout_w4.h): host reference and GPU kernels. All of them go
// through prepacked_position(), the one definition of the layout.
#include "prefixquant/check.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant {
namespace {

constexpr int kThreads = 256;

PQ_HOST_DEVICE inline uint8_t canonical_nibble(const uint8_t* weight_packed, int n, int k, int row,
                                               int column) {
  if (row >= n || column >= k) return 0;
  const int64_t row_bytes = (k + 1) / 2;
  return weight_packed[row * row_bytes + column / 2] >> (column % 2 * 4) & 0xF;
}

// The two weights of prepacked byte `index`: inverse of prepacked_position for byte offsets.
struct ByteSource {
  int row;
  int k;  // of the low nibble (4-bit) or of the byte (8-bit); the high nibble is 32 further
};
PQ_HOST_DEVICE inline ByteSource byte_source(int64_t index, int k_padded, int weight_bits) {
  const int block_k = weight_bits == 4 ? 64 : 32;
  const int64_t block = index / kFragmentBlockBytes;
  const int in_block = static_cast<int>(index % kFragmentBlockBytes);
  const int k_blocks = k_padded / block_k;
  const int thread = in_block / 16, word = in_block % 16 / 4, byte = in_block % 4;
  const int warp = thread / 32, group = thread % 32 / 4, quad = thread % 4;
  return {static_cast<int>(block / k_blocks) * 64 + warp * 16 + group + 8 * (word & 1),
          static_cast<int>(block % k_blocks) * block_k + 4 * quad + byte + 16 * (word >> 1)};
}

// Grid: one thread a prepacked byte.
__global__ void prepack_w4_kernel(const uint8_t* weight_packed, uint8_t* prepacked, int n, int k,
                                  int k_padded, int64_t bytes) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const ByteSource s = byte_source(i, k_padded, 4);
  prepacked[i] = canonical_nibble(weight_packed, n, k, s.row, s.k) |
                 canonical_nibble(weight_packed, n, k, s.row, s.k + 32) << 4;
}

__global__ void prepack_w8_kernel(const int8_t* weight, uint8_t* prepacked, int n, int k,
                                  int k_padded, int64_t bytes) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const ByteSource s = byte_source(i, k_padded, 8);
  prepacked[i] = s.row < n && s.k < k ? weight[int64_t{s.row} * k + s.k] : 0;
}

PQ_HOST_DEVICE inline uint8_t prepacked_nibble(const uint8_t* prepacked, int row, int k,
                                               int k_padded) {
  const PrepackedPosition p = prepacked_position(row, k, k_padded, 4);
  return prepacked[p.byte] >> (4 * p.nibble) & 0xF;
}

// Grid: one thread a canonical byte.
__global__ void unpack_prepacked_w4_kernel(const uint8_t* prepacked, uint8_t* weight_packed, int n,
                                           int k, int k_padded) {
  const int64_t row_bytes = (k + 1) / 2;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= row_bytes * n) return;
  const int row = static_cast<int>(i / row_bytes), column = static_cast<int>(i % row_bytes) * 2;
  const uint8_t high = column + 1 < k ? prepacked_nibble(prepacked, row, column + 1, k_padded) : 0;
  weight_packed[i] = prepacked_nibble(prepacked, row, column, k_padded) | high << 4;
}

__global__ void unpack_prepacked_w8_kernel(const uint8_t* prepacked, int8_t* weight, int n, int k,
                                           int k_padded) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= int64_t{n} * k) return;
  const int row = static_cast<int>(i / k), column = static_cast<int>(i % k);
  weight[i] = static_cast<int8_t>(prepacked[prepacked_position(row, column, k_padded, 8).byte]);
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

void prepack_w4_host(const uint8_t* weight_packed, uint8_t* prepacked, int n, int k) {
  const int64_t bytes = prepacked_bytes(n, k, 4);
  for (int64_t i = 0; i < bytes; ++i) {
    const ByteSource s = byte_source(i, padded_k(k), 4);
    prepacked[i] = canonical_nibble(weight_packed, n, k, s.row, s.k) |
                   canonical_nibble(weight_packed, n, k, s.row, s.k + 32) << 4;
  }
}

void unpack_prepacked_w4_host(const uint8_t* prepacked, uint8_t* weight_packed, int n, int k) {
  const int64_t row_bytes = (k + 1) / 2;
  for (int row = 0; row < n; ++row) {
    for (int column = 0; column < k; column += 2) {
      const uint8_t high =
          column + 1 < k ? prepacked_nibble(prepacked, row, column + 1, padded_k(k)) : 0;
      weight_packed[row * row_bytes + column / 2] =
          prepacked_nibble(prepacked, row, column, padded_k(k)) | high << 4;
    }
  }
}

void prepack_w8_host(const int8_t* weight, uint8_t* prepacked, int n, int k) {
  const int64_t bytes = prepacked_bytes(n, k, 8);
  for (int64_t i = 0; i < bytes; ++i) {
    const ByteSource s = byte_source(i, padded_k(k), 8);
    prepacked[i] = s.row < n && s.k < k ? weight[int64_t{s.row} * k + s.k] : 0;
  }
}

void unpack_prepacked_w8_host(const uint8_t* prepacked, int8_t* weight, int n, int k) {
  for (int row = 0; row < n; ++row)
    for (int column = 0; column < k; ++column)
      weight[int64_t{row} * k + column] =
          static_cast<int8_t>(prepacked[prepacked_position(row, column, padded_k(k), 8).byte]);
}

void launch_prepack_w4(const uint8_t* weight_packed, uint8_t* prepacked, int n, int k,
                       cudaStream_t stream) {
  const int64_t bytes = prepacked_bytes(n, k, 4);
  if (bytes == 0) return;
  prepack_w4_kernel<<<blocks_for(bytes), kThreads, 0, stream>>>(weight_packed, prepacked, n, k,
                                                                padded_k(k), bytes);
  PQ_CUDA_CHECK(cudaGetLastError());
}

void launch_unpack_prepacked_w4(const uint8_t* prepacked, uint8_t* weight_packed, int n, int k,
                                cudaStream_t stream) {
  if (n == 0 || k == 0) return;
  unpack_prepacked_w4_kernel<<<blocks_for(int64_t{n} * ((k + 1) / 2)), kThreads, 0, stream>>>(
      prepacked, weight_packed, n, k, padded_k(k));
  PQ_CUDA_CHECK(cudaGetLastError());
}

void launch_prepack_w8(const int8_t* weight, uint8_t* prepacked, int n, int k,
                       cudaStream_t stream) {
  const int64_t bytes = prepacked_bytes(n, k, 8);
  if (bytes == 0) return;
  prepack_w8_kernel<<<blocks_for(bytes), kThreads, 0, stream>>>(weight, prepacked, n, k,
                                                                padded_k(k), bytes);
  PQ_CUDA_CHECK(cudaGetLastError());
}

void launch_unpack_prepacked_w8(const uint8_t* prepacked, int8_t* weight, int n, int k,
                                cudaStream_t stream) {
  if (n == 0 || k == 0) return;
  unpack_prepacked_w8_kernel<<<blocks_for(int64_t{n} * k), kThreads, 0, stream>>>(
      prepacked, weight, n, k, padded_k(k));
  PQ_CUDA_CHECK(cudaGetLastError());
}

}  // namespace prefixquant
