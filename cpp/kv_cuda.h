// SPDX-License-Identifier: Apache-2.0
// The checks that the CUDA operations on a KV cache share.
#pragma once

#include <limits>
#include <mutex>
#include <vector>

#include "prefixquant/device_info.h"
#include "prefixquant/kv_attention.h"
#include "tensor_view.h"

namespace prefixquant {

inline int checked_size(const ArgumentChecker& check, const char* name, int64_t size) {
  PQ_CHECK(check.op, size >= 0 && size <= std::numeric_limits<int>::max(), name,
           ": expected a size below 2^31, got ", size);
  return static_cast<int>(size);
}

inline KvDtype kv_dtype(const ArgumentChecker& check, const TensorView& t, const char* name) {
  switch (t.dtype) {
    case DType::kUInt8:
      return KvDtype::kInt4;
    case DType::kInt8:
      return KvDtype::kInt8;
    case DType::kFloat16:
      return KvDtype::kFloat16;
    case DType::kBFloat16:
      return KvDtype::kBFloat16;
    case DType::kFloat32:
      return KvDtype::kFloat32;
    default:
      throw std::invalid_argument(
          concat(check.op, ": ", name,
                 ": expected dtype uint8 (packed 4-bit), int8, float16, bfloat16 or float32, got ",
                 dtype_name(t.dtype)));
  }
}

inline const float* take_head_scale(const ArgumentChecker& check, const OptionalTensor& t,
                                    const char* name, int64_t heads, int device) {
  PQ_CHECK(check.op, t.has_value(), name, ": expected a tensor for a quantized cache, got None");
  check.on_cuda(*t, name, device);
  check.dtype(*t, name, DType::kFloat32);
  check.rank(*t, name, 1);
  check.size(*t, name, 0, heads);
  check.contiguous(*t, name);
  return t->data<float>();
}

inline const int32_t* take_block_table(const ArgumentChecker& check, const TensorView& t,
                                       int64_t sequences, int device) {
  check.on_cuda(t, "block_table", device);
  check.dtype(t, "block_table", DType::kInt32);
  check.rank(t, "block_table", 2);
  PQ_CHECK(check.op, t.size(0) >= sequences, "block_table: expected at least ", sequences,
           " rows, got shape ", t.shape_text());
  PQ_CHECK(check.op, t.size(1) <= 1 || t.stride(1) == 1,
           "block_table: expected contiguous rows, got a stride of ", t.stride(1));
  return t.data<int32_t>();
}

// Asked for once a device: the driver answers in microseconds, which a decode step would feel.
inline DeviceInfo device_info_of(int device) {
  static std::mutex mutex;
  static std::vector<DeviceInfo> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(known.size()) <= device) known.resize(device + 1, DeviceInfo{0, 0});
  if (known[device].sm_count == 0) known[device] = cuda_device_info(device);
  return known[device];
}

}  // namespace prefixquant
