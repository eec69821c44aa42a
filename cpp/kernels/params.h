// SPDX-License-Identifier: Apache-2.0
// What the row kernels are told: plain structs, filled by the operation's .cpp file and read by
// every compiled copy of the kernel. Strides are in elements.
#pragma once

#include <cstdint>

namespace prefixquant {

enum class FloatType : uint8_t { kFloat32, kBFloat16, kFloat16 };

// q = clamp(rint(x * inv_scale), qmin, qmax); NaN -> 0.
struct QuantizerParams {
  float inv_scale;  // float32(1) / scale
  float qmin;       // -2^(bits-1)
  float qmax;       //  2^(bits-1) - 1
};

// A vector [cols] beside rows of cols elements; data is null where it is absent.
struct ChannelVector {
  const void* data;
  FloatType type;
};

// One Hadamard of size block = pow2 * k; k outer. block = 1 stands for "no transform".
struct HadamardParams {
  int64_t block;
  int64_t pow2;
  int64_t k;
  // [k/4 groups of 4 rows][k/4 groups of 4 columns][4 rows]: which of the 16 signed sums of its
  // four inputs a row adds; bit b is set where the sign of input b is -1.
  const uint8_t* picks;
  float norm;  // float32(1 / sqrt(block))
};

// Floats of a row that a kernel without a transform keeps in L1 at a time.
constexpr int64_t kRowChunk = 2048;

struct QuantizeRows {
  const void* x;  // [rows, cols]
  FloatType x_type;
  int64_t x_stride;
  int8_t* q;  // [rows, cols] contiguous
  int64_t cols;
  QuantizerParams quantizer;
};

// What a row kernel writes.
enum class RowOutput : uint8_t {
  kFloat,   // the type of the input
  kInt8,    // one value a byte
  kPacked,  // two values a byte, even index in the low nibble
};

struct RmsnormRows {
  const void* x;  // [rows, cols]
  FloatType x_type;
  int64_t x_stride;
  void* residual;  // [rows, cols] of x_type or null: becomes residual + x, which is then normalized
  int64_t residual_stride;
  ChannelVector weight;
  ChannelVector shift;  // subtracted from what the static quantizer gets
  double eps;
  void* y;  // [rows, cols or cols / 2] contiguous
  RowOutput output;
  float* row_scale;  // [rows]: dynamic scales are written there; null: the static quantizer
  int64_t cols;
  QuantizerParams quantizer;
};

struct QuantizeDynamicRows {
  const void* x;  // [rows, cols]
  FloatType x_type;
  int64_t x_stride;
  int8_t* q;         // [rows, cols] contiguous
  float* row_scale;  // [rows]
  int64_t cols;
  QuantizerParams quantizer;  // its bounds; inv_scale is each row's own
  float clip;                 // factor of the largest magnitude
};

struct HadamardRows {
  const void* x;  // [rows, cols], or the gate when `up` is there
  FloatType x_type;
  int64_t x_stride;
  const void* up;  // [rows, cols] of x_type or null
  int64_t up_stride;
  void* y;  // [rows, cols] contiguous: x_type when it is not quantized, int8 when it is
  bool quantized;
  float* row_scale;  // [rows]: dynamic scales are written there; null: the static quantizer
  int64_t cols;
  HadamardParams hadamard;
  QuantizerParams quantizer;
};

struct RmsnormHadamardRows {
  const void* x;  // [rows, cols]
  FloatType x_type;
  int64_t x_stride;
  ChannelVector weight;
  ChannelVector shift;
  double eps;
  int8_t* q;  // [rows, cols] contiguous
  int64_t cols;
  HadamardParams hadamard;  // block = cols
  QuantizerParams quantizer;
};

struct AbsMaxRows {
  const void* x;  // [rows, cols]
  FloatType x_type;
  int64_t x_stride;
  float* row_max;  // [rows]
  int64_t cols;
};

// Rows are numbered ((b * heads) + h) * tokens + t.
struct KvRows {
  int64_t heads;
  int64_t tokens;
  int64_t dim;    // D, of the unpacked rows
  int bits;       // 4: two values a byte, even index in the low nibble; 8: int8
  const void* x;  // [B, H, T, D], D contiguous
  FloatType x_type;
  int64_t x_strides[3];
  uint8_t* q;  // [B, H, T, D/2 or D]; for an append it points at token `position`
  int64_t q_strides[3];
  const float* scale;  // [H]
  HadamardParams hadamard;
  const float* shift;  // kv_quantize only: [H, D] or null
  void* y;             // kv_dequantize only: [B, H, T, D] contiguous of y_type
  FloatType y_type;
};

// One token a row: the projections of its query, key and value heads and where its key and value
// go.
struct RopeKvRows {
  const void* qkv;  // [rows, (heads + 2 * kv_heads) * dim]
  FloatType type;
  int64_t qkv_stride;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  const float* cos;  // [positions, dim] contiguous
  const float* sin;
  const int32_t* positions;  // [rows]
  const void* q_norm;        // [dim] or null
  const void* k_norm;
  FloatType norm_type;
  double eps;
  HadamardParams rotation;  // of queries and keys, block = dim or 1
  const float* k_shift;     // [kv_heads, dim] or null: subtracted from the rotated keys
  int kv_bits;              // 4: two values a byte, 8: int8, 16: floating
  const float* k_scale;     // [kv_heads], not read at 16 bits
  const float* v_scale;
  void* k_cache;  // [pages, kv_heads, page_size, dim or dim / 2]
  void* v_cache;
  FloatType cache_type;  // at 16 bits
  int64_t k_strides[3];
  int64_t v_strides[3];
  int64_t page_size;
  const int64_t* slots;  // [rows]: page * page_size + row of the page, below 0: not written
  void* q;               // [rows, heads, dim] contiguous, of `type`
};

}  // namespace prefixquant
