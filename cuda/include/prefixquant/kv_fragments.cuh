// SPDX-License-Identifier: Apache-2.0
// Rows of a KV cache (4-bit, 8-bit or 16-bit) -> registers of 16-bit values, as the A operand of
// mma.m16n8k16 wants them.
//
// The MMA sums over its k index, so any order of k will do as long as both operands use it. That
// freedom pays for the unpacking:
//   keys    one lane holds consecutive bytes of one token; a word becomes pairs of channels of that
//           token, in the order kKeyPair (4 bits: channel i beside channel i + 4).
//   values  one lane holds the same bytes of two tokens; a word of each becomes pairs
//           (token, next token) of one channel, channel by channel.
//
// An integer n goes under the mantissa of 1024.0 (0x6400): 1024 + n is exact in float16, and so is
// the subtraction. Two's complement needs one xor of the sign bit, which lop3 does on the way. A
// nibble in bits 4..7 arrives as 16 n and leaves by an FMA with 1/16.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace prefixquant {

enum class KvFormat : int { kInt4, kInt8, kFloat16, kBFloat16 };

__host__ __device__ constexpr int kv_bits(KvFormat format) {
  return format == KvFormat::kInt4 ? 4 : format == KvFormat::kInt8 ? 8 : 16;
}

// (a & b) ^ c
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// pair * factor + addend in float16, both halves; the constants are bit patterns.
__device__ __forceinline__ uint32_t fma_half2(uint32_t pair, uint32_t factor, uint32_t addend) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(pair), "r"(factor), "r"(addend));
  return d;
}

__device__ __forceinline__ uint32_t add_half2(uint32_t pair, uint32_t addend) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(pair), "r"(addend));
  return d;
}

inline constexpr uint32_t kHalf2Minus1032 = 0xE408E408u;  // -(1024 + 8)
inline constexpr uint32_t kHalf2Minus72 = 0xD480D480u;    // -(1024 + 128) / 16
inline constexpr uint32_t kHalf2Minus1152 = 0xE480E480u;  // -(1024 + 128)
inline constexpr uint32_t kHalf2Sixteenth = 0x2C002C00u;  // 1 / 16

// The four nibbles of each 16-bit half of `word`: pair[i] = (nibble i low half, nibble i high
// half).
__device__ __forceinline__ void unpack_nibbles(uint32_t word, uint32_t (&pair)[4]) {
  const uint32_t upper = word >> 8;
  pair[0] = add_half2(and_xor(word, 0x000F000Fu, 0x64086408u), kHalf2Minus1032);
  pair[1] = fma_half2(and_xor(word, 0x00F000F0u, 0x64806480u), kHalf2Sixteenth, kHalf2Minus72);
  pair[2] = add_half2(and_xor(upper, 0x000F000Fu, 0x64086408u), kHalf2Minus1032);
  pair[3] = fma_half2(and_xor(upper, 0x00F000F0u, 0x64806480u), kHalf2Sixteenth, kHalf2Minus72);
}

// Bytes 0, 1 and 2, 3 of `word` (int8 with the sign bit flipped) -> two pairs.
__device__ __forceinline__ void unpack_bytes(uint32_t word, uint32_t (&pair)[2]) {
  pair[0] = add_half2(__byte_perm(word, 0x64646464u, 0x4140), kHalf2Minus1152);
  pair[1] = add_half2(__byte_perm(word, 0x64646464u, 0x4342), kHalf2Minus1152);
}

template <KvFormat kFormat>
struct KvUnpack {
  static constexpr int kBits = kv_bits(kFormat);
  static constexpr bool kIsBf16 = kFormat == KvFormat::kBFloat16;   // type of the MMA operands
  static constexpr int kWordsPerStep = kBits == 4 ? 1 : kBits / 4;  // words of two k16 steps
  static constexpr int kWordChannels = 32 / kBits;

  // Channel (within its word) of half 0 of key pair `i` of a word; half 1 is kKeyPairStep further.
  static constexpr int kKeyPairStep = kBits == 4 ? 4 : 1;
  static constexpr int kPairsPerWord = kWordChannels / 2;
  __host__ __device__ static constexpr int key_channel(int i) { return kBits == 4 ? i : 2 * i; }

  // One word of one token -> pairs of its channels.
  __device__ __forceinline__ static void key_word(uint32_t word, uint32_t (&pair)[kPairsPerWord]) {
    if constexpr (kBits == 4) {
      unpack_nibbles(word, pair);
    } else if constexpr (kBits == 8) {
      unpack_bytes(word ^ 0x80808080u, pair);
    } else {
      pair[0] = word;
    }
  }

  // One word of two tokens -> (first token, second token) of every channel of the word.
  __device__ __forceinline__ static void value_word(uint32_t first, uint32_t second,
                                                    uint32_t (&pair)[kWordChannels]) {
    if constexpr (kBits == 4) {
      uint32_t low[4], high[4];
      unpack_nibbles(__byte_perm(first, second, 0x5410), low);
      unpack_nibbles(__byte_perm(first, second, 0x7632), high);
#pragma unroll
      for (int i = 0; i < 4; ++i) pair[i] = low[i], pair[4 + i] = high[i];
    } else if constexpr (kBits == 8) {
      uint32_t low[2], high[2];
      first ^= 0x80808080u, second ^= 0x80808080u;
      unpack_bytes(__byte_perm(first, second, 0x5140), low);
      unpack_bytes(__byte_perm(first, second, 0x7362), high);
      pair[0] = low[0], pair[1] = low[1], pair[2] = high[0], pair[3] = high[1];
    } else {
      pair[0] = __byte_perm(first, second, 0x5410);
      pair[1] = __byte_perm(first, second, 0x7632);
    }
  }
};

}  // namespace prefixquant
