// SPDX-License-Identifier: Apache-2.0
//
// The one prepacked weight layout of the GEMM and GEMV kernels, for 4-bit and 8-bit weights, with
// its host reference (plain C++) and its GPU prepack launchers.
//
// Layout
//   Canonical weights: uint8 [N, K/2], low nibble = even k, two's complement; or int8 [N, K].
//   N is padded to a multiple of kPackRows = 64 and K to a multiple of kPackK = 128, with zeros.
//   The matrix is cut into *fragment blocks* of 2048 bytes = 128 threads x 16 bytes:
//     4-bit: 64 rows x 64 k;      8-bit: 64 rows x 32 k.
//   Block (row_block, k_block) starts at (row_block * k_blocks + k_block) * 2048: the blocks of one
//   group of 64 rows are contiguous along K, so any K range of it is one bulk copy.
//
//   Within a block, thread t = 32 * warp + lane (warp 0..3, group = lane / 4, quad = lane % 4) owns
//   bytes [16 t, 16 t + 16): four little-endian words, word j = the register a_j of the A fragment
//   of wgmma m64n*k32 (and, warp by warp, of mma.m16n8k32: rows 16 warp .. 16 warp + 15):
//     row(j) = 16 * warp + group + 8 * (j & 1)
//     k(j, byte) = 4 * quad + byte + 16 * (j >> 1)                       0 <= byte < 4
//   8-bit: byte `byte` of word j is W[row(j)][k(j, byte)].
//   4-bit: the same byte holds two weights, of the two k32 steps of the block:
//     low nibble  = W[row(j)][k(j, byte)],   high nibble = W[row(j)][32 + k(j, byte)]
//   so `(w << 4) & 0xF0F0F0F0` is register a_j of step 0 and `w & 0xF0F0F0F0` that of step 1, as
//   int8 lanes of 16x the weight: three integer instructions for eight weights.
//
// Why: every thread's weights for K = 64 are one 16-byte load; a warp's loads are 512 contiguous
// bytes (no shared memory bank conflict, fully coalesced in global memory); no shuffles anywhere.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace prefixquant {

inline constexpr int kPackRows = 64;  // rows of one fragment block
inline constexpr int kPackK = 128;    // K padding: one pipeline stage of the wgmma kernel
inline constexpr int kFragmentBlockBytes = 2048;
inline constexpr int kFragmentThreads = 128;  // threads sharing one fragment block

// K covered by one fragment block: 64 for 4-bit weights, 32 for 8-bit ones.
constexpr int fragment_block_k(int weight_bits) { return weight_bits == 4 ? 64 : 32; }
constexpr int padded_rows(int n) { return (n + kPackRows - 1) / kPackRows * kPackRows; }
constexpr int padded_k(int k) { return (k + kPackK - 1) / kPackK * kPackK; }

// Bytes of a prepacked [N, K] weight matrix.
constexpr int64_t prepacked_bytes(int n, int k, int weight_bits) {
  return int64_t{padded_rows(n)} * padded_k(k) * weight_bits / 8;
}

// Where one weight lives: byte offset in the prepacked buffer and, for 4-bit weights, which nibble.
struct PrepackedPosition {
  int64_t byte;
  int nibble;  // 0 = low, 1 = high; always 0 for 8-bit weights
};

#ifdef __CUDACC__
#define PQ_HOST_DEVICE __host__ __device__
#else
#define PQ_HOST_DEVICE
#endif

PQ_HOST_DEVICE constexpr PrepackedPosition prepacked_position(int row, int k, int k_padded,
                                                              int weight_bits) {
  const int block_k = weight_bits == 4 ? 64 : 32;
  const int k_in_block = k % block_k;
  const int step = k_in_block / 32;
  const int k_in_step = k_in_block % 32;
  const int row_in_warp = row % 16;
  const int thread = row % 64 / 16 * 32 + row_in_warp % 8 * 4 + k_in_step % 16 / 4;
  const int word = row_in_warp / 8 + k_in_step / 16 * 2;
  const int64_t block = int64_t{row / 64} * (k_padded / block_k) + k / block_k;
  return {block * 2048 + thread * 16 + word * 4 + k_in_step % 4, step};
}

// Host reference, exact inverses of each other. Padding is written as zero and ignored on reading.
//   weight_packed: uint8 [N, ceil(K/2)]   weight: int8 [N, K]
//   prepacked: prepacked_bytes(n, k, bits) bytes
void prepack_w4_host(const uint8_t* weight_packed, uint8_t* prepacked, int n, int k);
void unpack_prepacked_w4_host(const uint8_t* prepacked, uint8_t* weight_packed, int n, int k);
void prepack_w8_host(const int8_t* weight, uint8_t* prepacked, int n, int k);
void unpack_prepacked_w8_host(const uint8_t* prepacked, int8_t* weight, int n, int k);

// The same on the GPU: device pointers, asynchronous on `stream`, no allocation.
void launch_prepack_w4(const uint8_t* weight_packed, uint8_t* prepacked, int n, int k,
                       cudaStream_t stream);
void launch_unpack_prepacked_w4(const uint8_t* prepacked, uint8_t* weight_packed, int n, int k,
                                cudaStream_t stream);
void launch_prepack_w8(const int8_t* weight, uint8_t* prepacked, int n, int k, cudaStream_t stream);
void launch_unpack_prepacked_w8(const uint8_t* prepacked, int8_t* weight, int n, int k,
                                cudaStream_t stream);

}  // namespace prefixquant
