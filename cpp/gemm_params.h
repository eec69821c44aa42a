// SPDX-License-Identifier: Apache-2.0
// What the GEMM kernels of every instruction set are given, and the prepacked weight layout that
// all of them read.
//
// Layout of a prepacked weight [N, K]
//   N is padded to a multiple of 16 and K to a multiple of 64, with zeros. The outer index is the
//   block of 16 outputs, then the group of 8 inputs; a group of a block is contiguous:
//     4-bit: uint8 [N/16, K/8, 64]; byte 4 r + j holds w[16 b + r, 8 g + j] + 8 in its low nibble
//     and
//            w[16 b + r, 8 g + 4 + j] + 8 in its high one                       0 <= r < 16, 0 <= j
//            < 4
//     8-bit: uint8 [N/16, K/8, 128]; byte 64 h + 4 r + j holds w[16 b + r, 8 g + 4 h + j] + 128
//   One 64-byte load is thus one (8-bit) or two (4-bit, `v & 15` and `v >> 4 & 15`) registers of 16
//   outputs x 4 inputs, the operand shape of vpdpbusd, and 16 such registers are a B tile of AMX.
//
// Weights are stored unsigned (plus kOffset) because vpdpbusd and vpmaddubsw multiply unsigned by
// signed; the kernels take kOffset * sum_k x[m, k] off again. The padding of K is never multiplied
// by anything but zero. All sums are modulo 2^32, so the intermediate ones may wrap.
#pragma once

#include <cstdint>

namespace prefixquant {

constexpr int64_t kBlockOutputs = 16;
constexpr int64_t kGroupInputs = 8;
constexpr int64_t kPadInputs = 64;  // the K step of an AMX tile

enum class GemmOutput : int { kFloat32, kBFloat16, kFloat16, kInt32 };

struct GemmParams {
  const int8_t* x;            // [m, k], contiguous
  const uint8_t* weight;      // prepacked [n, k]
  const float* weight_scale;  // [n]
  float input_scale;
  const float* bias;  // [n], may be nullptr
  void* y;            // [m, n], contiguous, of output_dtype
  GemmOutput output_dtype;
  int64_t m;
  int64_t n;
  int64_t k;
  int max_threads;

  // Filled by the kernel.
  int32_t* row_sum;  // [m]: sum_k x[m, k]
  int8_t* x_tail;    // [m, 64]: x[m, k / 64 * 64 ..], zero-padded; unused where 64 divides k
};

// Outputs [first, last) of every row.
struct OutputRange {
  int64_t first;
  int64_t last;
};

// A buffer of at least `bytes`, 64-byte aligned, that belongs to the calling thread until it asks
// for the same slot again: kernels allocate nothing per call.
enum class ScratchSlot : int { kRowData, kPanel, kCount };
void* thread_scratch(ScratchSlot slot, int64_t bytes);

}  // namespace prefixquant
