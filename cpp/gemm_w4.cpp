// SPDX-License-Identifier: Apache-2.0
// gemm_w4 / gemm_w8: int8 activations times prepacked 4-bit or 8-bit weights, and the prepacking.
//
//   acc[m, n] = sum_k x[m, k] * w[n, k]                              exactly, in int32
//   y[m, n]   = float(acc) * (input_scale * weight_scale[n]) (+ bias[n]), rounded to y's dtype
//
// y int32 receives acc itself. The prepacked layout is described in gemm_params.h.
#include "gemm_params.h"

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "ops.h"

namespace prefixquant {

using GemmKernel = void(const GemmParams&);
PQ_KERNEL_TABLE(GemmKernel, gemm_w4_kernel);
PQ_KERNEL_TABLE(GemmKernel, gemm_w8_kernel);

void* thread_scratch(ScratchSlot slot, int64_t bytes) {
  struct Buffer {
    void* ptr = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(ptr); }
  };
  thread_local Buffer buffers[static_cast<int>(ScratchSlot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.ptr);
    buffer.bytes = (bytes + 4095) / 4096 * 4096;
    buffer.ptr = std::aligned_alloc(64, static_cast<size_t>(buffer.bytes));
    if (!buffer.ptr) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.ptr;
}

namespace {

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The three sizes of the prepacked tensor of an [n, k] weight.
struct PrepackedShape {
  int64_t blocks;
  int64_t groups;
  int64_t group_bytes;

  PrepackedShape(int bits, int64_t n, int64_t k)
      : blocks(round_up(n, kBlockOutputs) / kBlockOutputs),
        groups(round_up(k, kPadInputs) / kGroupInputs),
        group_bytes(kBlockOutputs * kGroupInputs * bits / 8) {}

  void check(const ArgumentChecker& check, const TensorView& t, const char* name) const {
    PQ_CHECK(check.op,
             t.ndim == 3 && t.size(0) == blocks && t.size(1) == groups && t.size(2) == group_bytes,
             name, ": expected a prepacked weight of shape [", blocks, ", ", groups, ", ",
             group_bytes, "], got ", t.shape_text());
  }
};

void check_tensor(const ArgumentChecker& check, const TensorView& t, const char* name, DType dtype,
                  int rank) {
  check.on_cpu(t, name);
  check.dtype(t, name, dtype);
  if (rank >= 0) check.rank(t, name, rank);
  check.contiguous(t, name);
}

// Calls visit(byte index in the prepacked tensor, output, input) for the first input of every byte:
// 4-bit bytes hold inputs `k` (low nibble) and `k + 4` (high).
template <typename Visit>
void for_each_byte(int bits, int64_t n, int64_t k, Visit visit) {
  const PrepackedShape shape(bits, n, k);
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < shape.blocks; ++b) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      for (int64_t i = 0; i < shape.group_bytes; ++i) {
        visit((b * shape.groups + g) * shape.group_bytes + i, kBlockOutputs * b + i % 64 / 4,
              kGroupInputs * g + i / 64 * 4 + i % 4);
      }
    }
  }
}

std::vector<float> bias_as_float(const TensorView& bias) {
  std::vector<float> values(static_cast<size_t>(bias.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = bias.data<uint16_t>()[i];
    uint32_t word;
    if (bias.dtype == DType::kBFloat16) {
      word = static_cast<uint32_t>(bits) << 16;
    } else {
      // float16: the exponent moves by 112 (2^112 as a factor also normalises subnormals).
      const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13;
      float scaled;
      std::memcpy(&scaled, &magnitude, sizeof scaled);
      scaled *= 5192296858534827628530496329220096.0f;  // 2^112
      std::memcpy(&word, &scaled, sizeof word);
      if (magnitude >= 0x7C00u << 13) word = 0x7F800000u | magnitude;
      word |= static_cast<uint32_t>(bits & 0x8000) << 16;
    }
    std::memcpy(&values[i], &word, sizeof word);
  }
  return values;
}

GemmOutput output_dtype(const ArgumentChecker& check, const TensorView& y) {
  switch (y.dtype) {
    case DType::kFloat32:
      return GemmOutput::kFloat32;
    case DType::kBFloat16:
      return GemmOutput::kBFloat16;
    case DType::kFloat16:
      return GemmOutput::kFloat16;
    case DType::kInt32:
      return GemmOutput::kInt32;
    default:
      break;
  }
  throw std::invalid_argument(
      concat(check.op, ": out_dtype: expected float32, bfloat16, float16 or int32, got ",
             dtype_name(y.dtype)));
}

void gemm_checked(const char* op, int bits, const KernelTable<GemmKernel>& table,
                  const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
                  const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y) {
  const ArgumentChecker check{op};
  check_tensor(check, x, "x", DType::kInt8, 2);
  check_tensor(check, weight, "weight", DType::kUInt8, -1);
  check_tensor(check, weight_scale, "weight_scale", DType::kFloat32, 1);
  check_tensor(check, input_scale, "input_scale", DType::kFloat32, -1);
  PQ_CHECK(op, input_scale.numel() == 1, "input_scale: expected one element, got shape ",
           input_scale.shape_text());
  const int64_t m = x.size(0), n = weight_scale.size(0), k = x.size(1);
  PQ_CHECK(op, bits == 8 || k % 2 == 0, "x: expected an even last dimension, got shape ",
           x.shape_text());
  PrepackedShape(bits, n, k).check(check, weight, "weight");
  if (bias) {
    check.on_cpu(*bias, "bias");
    check.floating(*bias, "bias");
    check.rank(*bias, "bias", 1);
    check.size(*bias, "bias", 0, n);
    check.contiguous(*bias, "bias");
  }
  const GemmOutput out = output_dtype(check, y);
  check.on_cpu(y, "y");
  check.rank(y, "y", 2);
  check.size(y, "y", 0, m);
  check.size(y, "y", 1, n);
  check.contiguous(y, "y");

  GemmParams p{};
  p.x = x.data<int8_t>();
  p.weight = weight.data<uint8_t>();
  p.weight_scale = weight_scale.data<float>();
  p.input_scale = *input_scale.data<float>();
  std::vector<float> converted_bias;
  if (bias && bias->dtype == DType::kFloat32) p.bias = bias->data<float>();
  if (bias && bias->dtype != DType::kFloat32) {
    converted_bias = bias_as_float(*bias);
    p.bias = converted_bias.data();
  }
  p.y = y.ptr;
  p.output_dtype = out;
  p.m = m;
  p.n = n;
  p.k = k;
  p.max_threads = omp_get_max_threads();

  const int64_t sum_bytes = round_up(m * static_cast<int64_t>(sizeof(int32_t)), 64);
  const int64_t tail_bytes = k % kPadInputs ? m * kPadInputs : 0;
  char* rows = static_cast<char*>(thread_scratch(ScratchSlot::kRowData, sum_bytes + tail_bytes));
  p.row_sum = reinterpret_cast<int32_t*>(rows);
  p.x_tail = reinterpret_cast<int8_t*>(rows + sum_bytes);
  table.pick()(p);
}

}  // namespace

void prepack_w4(const TensorView& weight_packed, const TensorView& prepacked) {
  const ArgumentChecker check{"prepack_w4"};
  check_tensor(check, weight_packed, "weight_packed", DType::kUInt8, 2);
  check_tensor(check, prepacked, "prepacked", DType::kUInt8, -1);
  const int64_t n = weight_packed.size(0), k = 2 * weight_packed.size(1);
  PrepackedShape(4, n, k).check(check, prepacked, "prepacked");
  const uint8_t* src = weight_packed.data<uint8_t>();
  uint8_t* dst = prepacked.data<uint8_t>();
  for_each_byte(4, n, k, [=](int64_t at, int64_t row, int64_t col) {
    const auto nibble = [=](int64_t c) {  // two's complement plus 8 is the sign bit flipped
      return row < n && c < k ? (src[row * (k / 2) + c / 2] >> c % 2 * 4 & 15) ^ 8 : 8;
    };
    dst[at] = static_cast<uint8_t>(nibble(col) | nibble(col + 4) << 4);
  });
}

void unprepack_w4(const TensorView& prepacked, const TensorView& weight_packed) {
  const ArgumentChecker check{"unprepack_w4"};
  check_tensor(check, prepacked, "prepacked", DType::kUInt8, -1);
  check_tensor(check, weight_packed, "weight_packed", DType::kUInt8, 2);
  const int64_t n = weight_packed.size(0), k = 2 * weight_packed.size(1);
  const PrepackedShape shape(4, n, k);
  shape.check(check, prepacked, "prepacked");
  const uint8_t* src = prepacked.data<uint8_t>();
  uint8_t* dst = weight_packed.data<uint8_t>();
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < k / 2; ++i) {
      const int64_t group = row / kBlockOutputs * shape.groups + 2 * i / kGroupInputs;
      const int64_t in_group = 2 * i % kGroupInputs;  // even, so both inputs are in one half
      const uint8_t* pair = src + group * 64 + row % kBlockOutputs * 4 + in_group % 4;
      const int shift = in_group < 4 ? 0 : 4;
      dst[row * (k / 2) + i] =
          static_cast<uint8_t>(((pair[0] >> shift & 15) | (pair[1] >> shift & 15) << 4) ^ 0x88);
    }
  }
}

void prepack_w8(const TensorView& weight, const TensorView& prepacked) {
  const ArgumentChecker check{"prepack_w8"};
  check_tensor(check, weight, "weight", DType::kInt8, 2);
  check_tensor(check, prepacked, "prepacked", DType::kUInt8, -1);
  const int64_t n = weight.size(0), k = weight.size(1);
  PrepackedShape(8, n, k).check(check, prepacked, "prepacked");
  const int8_t* src = weight.data<int8_t>();
  uint8_t* dst = prepacked.data<uint8_t>();
  for_each_byte(8, n, k, [=](int64_t at, int64_t row, int64_t col) {
    dst[at] = static_cast<uint8_t>((row < n && col < k ? src[row * k + col] : 0) + 128);
  });
}

void unprepack_w8(const TensorView& prepacked, const TensorView& weight) {
  const ArgumentChecker check{"unprepack_w8"};
  check_tensor(check, prepacked, "prepacked", DType::kUInt8, -1);
  check_tensor(check, weight, "weight", DType::kInt8, 2);
  const int64_t n = weight.size(0), k = weight.size(1);
  PrepackedShape(8, n, k).check(check, prepacked, "prepacked");
  const uint8_t* src = prepacked.data<uint8_t>();
  int8_t* dst = weight.data<int8_t>();
  for_each_byte(8, n, k, [=](int64_t at, int64_t row, int64_t col) {
    if (row < n && col < k) dst[row * k + col] = static_cast<int8_t>(src[at] - 128);
  });
}

void gemm_w4(const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
             const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y) {
  gemm_checked("gemm_w4", 4, gemm_w4_kernel_table, x, weight, weight_scale, input_scale, bias, y);
}

void gemm_w8(const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
             const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y) {
  gemm_checked("gemm_w8", 8, gemm_w8_kernel_table, x, weight, weight_scale, input_scale, bias, y);
}

}  // namespace prefixquant
