// SPDX-License-Identifier: Apache-2.0
// The CUDA GEMM family behind the extension: checks in the order device, dtype, layout, shape, then
// the launch. Formula and epilogue: cuda/include/prefixquant/gemm_w4.h; layout: layout_w4.h.
#include <limits>
#include <sstream>

#include "ops_cuda.h"
#include "prefixquant/device_info.h"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant {
namespace {

constexpr int64_t kRowAlignment = 16;  // bytes: cp.async and the tensor map of x

cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

int checked_int(const char* op, const char* name, int64_t size) {
  PQ_CHECK(op, size >= 0 && size <= std::numeric_limits<int>::max(), name,
           ": expected a size below 2^31, got ", size);
  return static_cast<int>(size);
}

void check_bits(const char* op, int64_t bits) {
  PQ_CHECK(op, bits == 4 || bits == 8, "bits: expected 4 or 8, got ", bits);
}

void check_prepacked(const ArgumentChecker& check, const TensorView& t, const char* name,
                     int device, int n, int k, int bits) {
  check.on_cuda(t, name, device);
  check.dtype(t, name, DType::kUInt8);
  check.contiguous(t, name);
  const int64_t rows = padded_rows(n) / kPackRows, blocks = padded_k(k) / fragment_block_k(bits);
  PQ_CHECK(
      check.op,
      t.ndim == 3 && t.size(0) == rows && t.size(1) == blocks && t.size(2) == kFragmentBlockBytes,
      name, ": expected a prepacked weight of shape [", rows, ", ", blocks, ", ",
      kFragmentBlockBytes, "], got ", t.shape_text());
  check.aligned(t, name, 16);
}

// The canonical weight [n, k] of either direction of the prepacking.
void check_canonical(const ArgumentChecker& check, const TensorView& t, const char* name,
                     int device, int64_t bits) {
  check.on_cuda(t, name, device);
  check.dtype(t, name, bits == 4 ? DType::kUInt8 : DType::kInt8);
  check.rank(t, name, 2);
  check.contiguous(t, name);
}

DType rounding_dtype(const char* op, const std::string& name) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kInt32})
    if (name == dtype_name(dtype)) return dtype;
  throw std::invalid_argument(
      concat(op, ": out_dtype: expected float32, bfloat16, float16 or int32, got ", name));
}

GemmDtype gemm_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return GemmDtype::kFloat16;
    case DType::kBFloat16:
      return GemmDtype::kBFloat16;
    case DType::kInt32:
      return GemmDtype::kInt32;
    default:
      return GemmDtype::kFloat32;
  }
}

void check_one_float(const ArgumentChecker& check, const TensorView& t, const char* name,
                     int device) {
  check.on_cuda(t, name, device);
  check.dtype(t, name, DType::kFloat32);
  PQ_CHECK(check.op, t.numel() == 1, name, ": expected one element, got shape ", t.shape_text());
}

// Rows are contiguous; they may lie apart.
void check_rows(const ArgumentChecker& check, const TensorView& t, const char* name) {
  PQ_CHECK(check.op, t.size(1) <= 1 || t.stride(1) == 1, name,
           ": expected contiguous rows, got a column stride of ", t.stride(1));
  PQ_CHECK(check.op, t.size(0) <= 1 || t.stride(0) >= t.size(1), name,
           ": expected rows that do not overlap, got a row stride of ", t.stride(0));
}

int64_t row_stride(const TensorView& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

GemmConfigList to_list(const GemmW4Config& c) {
  return {static_cast<int64_t>(c.kernel),
          c.block_rows,
          c.block_tokens,
          c.stages,
          c.cluster,
          c.grid,
          c.split_k,
          c.stream_k_tiles,
          c.release_stages};
}

GemmW4Config from_list(const GemmConfigList& list) {
  PQ_CHECK(
      "gemm_w4",
      list.size() == 9 && list[0] >= 0 && list[0] <= static_cast<int>(GemmW4Kernel::kGemvStream),
      "config: expected 9 integers, the first one a kernel");
  GemmW4Config c;
  c.kernel = static_cast<GemmW4Kernel>(list[0]);
  int* const fields[] = {&c.block_rows, &c.block_tokens, &c.stages,         &c.cluster,
                         &c.grid,       &c.split_k,      &c.stream_k_tiles, &c.release_stages};
  for (int i = 0; i < 8; ++i) *fields[i] = checked_int("gemm_w4", "config", list[i + 1]);
  return c;
}

}  // namespace

void prepack_cuda(const TensorView& weight, int64_t bits, const TensorView& prepacked,
                  uintptr_t stream) {
  const ArgumentChecker check{bits == 4 ? "prepack_w4" : "prepack_w8"};
  const char* name = bits == 4 ? "weight_packed" : "weight";
  check_bits(check.op, bits);
  check_canonical(check, weight, name, weight.device, bits);
  const int n = checked_int(check.op, name, weight.size(0));
  const int k = checked_int(check.op, name, weight.size(1) * (8 / bits));
  check_prepacked(check, prepacked, "prepacked", weight.device, n, k, static_cast<int>(bits));
  if (prepacked.numel() == 0) return;
  if (bits == 4) {
    launch_prepack_w4(weight.data<uint8_t>(), prepacked.data<uint8_t>(), n, k, as_stream(stream));
  } else {
    launch_prepack_w8(weight.data<int8_t>(), prepacked.data<uint8_t>(), n, k, as_stream(stream));
  }
}

void unprepack_cuda(const TensorView& prepacked, int64_t bits, const TensorView& weight,
                    uintptr_t stream) {
  const ArgumentChecker check{bits == 4 ? "unprepack_w4" : "unprepack_w8"};
  check_bits(check.op, bits);
  check_canonical(check, weight, "weight", prepacked.device, bits);
  const int n = checked_int(check.op, "n", weight.size(0));
  const int k = checked_int(check.op, "k", weight.size(1) * (8 / bits));
  check_prepacked(check, prepacked, "prepacked", prepacked.device, n, k, static_cast<int>(bits));
  if (weight.numel() == 0) return;
  if (bits == 4) {
    launch_unpack_prepacked_w4(prepacked.data<uint8_t>(), weight.data<uint8_t>(), n, k,
                               as_stream(stream));
  } else {
    launch_unpack_prepacked_w8(prepacked.data<uint8_t>(), weight.data<int8_t>(), n, k,
                               as_stream(stream));
  }
}

GemmConfigList gemm_config_cuda(int64_t m, int64_t n, int64_t k, int64_t weight_bits,
                                int64_t activation_bits, int64_t sm_count, int64_t arch,
                                const std::string& family) {
  const char* op = "gemm_w4";
  check_bits(op, weight_bits);
  const GemmW4Shape shape{checked_int(op, "m", m), checked_int(op, "n", n), checked_int(op, "k", k),
                          static_cast<int>(weight_bits), static_cast<int>(activation_bits)};
  const int sms = checked_int(op, "sm_count", sm_count), sm_arch = checked_int(op, "arch", arch);
  if (family == "mma") return to_list(choose_gemm_w4_mma_config(shape, sms, sm_arch));
  if (family == "wgmma") return to_list(choose_gemm_w4_sm90_config(shape, sms));
  if (family == "mma_int4") return to_list(choose_gemm_w4_sm80_config(shape, sms));
  if (family == "stream") return to_list(choose_gemm_w4_stream_config(shape, sms));
  PQ_CHECK(op, family.empty(), "family: expected mma, wgmma, mma_int4 or stream, got ", family);
  return to_list(choose_gemm_w4_config(shape, sms, sm_arch));
}

std::string gemm_config_text(const GemmConfigList& config) {
  std::ostringstream text;
  text << from_list(config);
  return text.str();
}

uint64_t capture_id_cuda(uintptr_t stream) { return cuda_capture_id(as_stream(stream)); }

int64_t gemm_workspace_cuda(int64_t m, int64_t n, int64_t k, int64_t weight_bits,
                            const GemmConfigList& config) {
  const GemmW4Shape shape{static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
                          static_cast<int>(weight_bits)};
  return static_cast<int64_t>(gemm_w4_workspace_bytes(shape, from_list(config)));
}

std::pair<GemmConfigList, int64_t> gemm_plan_cuda(int64_t m, int64_t n, int64_t k,
                                                  int64_t weight_bits, int64_t activation_bits,
                                                  int64_t device) {
  const DeviceInfo info = cuda_device_info(static_cast<int>(device));
  const GemmConfigList config =
      gemm_config_cuda(m, n, k, weight_bits, activation_bits, info.sm_count, info.arch, "");
  return {config, gemm_workspace_cuda(m, n, k, weight_bits, config)};
}

void gemm_cuda(const TensorView& x, const TensorView& weight, int64_t weight_bits,
               const TensorView& weight_scale, const TensorView& input_scale,
               const OptionalTensor& bias, const GemmEpilogueArguments& epilogue,
               const TensorView& y, const OptionalTensor& workspace, const GemmConfigList& config,
               uintptr_t stream) {
  check_bits("gemm", weight_bits);
  const ArgumentChecker check{weight_bits == 4 ? "gemm_w4" : "gemm_w8"};
  const char* op = check.op;
  const int device = x.device;
  check.on_cuda(x, "x", device);
  check.dtype(x, "x", DType::kInt8);
  check.rank(x, "x", 2);
  check_rows(check, x, "x");
  check.on_cuda(weight_scale, "weight_scale", device);
  check.dtype(weight_scale, "weight_scale", DType::kFloat32);
  check.rank(weight_scale, "weight_scale", 1);
  check.contiguous(weight_scale, "weight_scale");
  check_one_float(check, input_scale, "input_scale", device);
  const int m = checked_int(op, "x", x.size(0)), k = checked_int(op, "x", x.size(1));
  const int n = checked_int(op, "weight_scale", weight_scale.size(0));
  check_prepacked(check, weight, "weight", device, n, k, static_cast<int>(weight_bits));

  GemmW4Params p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.x = x.data<int8_t>();
  p.x_row_stride = m <= 1 ? (k + kRowAlignment - 1) / kRowAlignment * kRowAlignment : x.stride(0);
  p.weight = weight.ptr;
  p.weight_bits = static_cast<int>(weight_bits);
  p.weight_scale = weight_scale.data<float>();
  p.input_scale = input_scale.data<float>();
  if (bias) {
    check.on_cuda(*bias, "bias", device);
    check.floating(*bias, "bias");
    check.rank(*bias, "bias", 1);
    check.size(*bias, "bias", 0, n);
    check.contiguous(*bias, "bias");
    p.bias = bias->ptr;
    p.bias_dtype = gemm_dtype(bias->dtype);
  }

  const int n_out = epilogue.swiglu ? n / 2 : n;
  const DType rounding = rounding_dtype(op, epilogue.rounding);
  p.out_dtype = gemm_dtype(rounding);
  p.swiglu = epilogue.swiglu;
  if (epilogue.residual) {
    const TensorView& residual = *epilogue.residual;
    check.on_cuda(residual, "residual", device);
    check.dtype(residual, "residual", rounding);
    check.rank(residual, "residual", 2);
    check.size(residual, "residual", 0, m);
    check.size(residual, "residual", 1, n_out);
    check_rows(check, residual, "residual");
    p.residual = residual.ptr;
    p.residual_row_stride = row_stride(residual);
  }
  if (epilogue.output_scale) {
    check_one_float(check, *epilogue.output_scale, "output_scale", device);
    PQ_CHECK(op, epilogue.output_bits == 4 || epilogue.output_bits == 8,
             "output_bits: expected 4 or 8, got ", epilogue.output_bits);
    p.output_scale = epilogue.output_scale->data<float>();
    p.output_qmin = epilogue.output_bits == 4 ? -8 : -128;
    p.output_qmax = epilogue.output_bits == 4 ? 7 : 127;
  }
  check.on_cuda(y, "y", device);
  check.dtype(y, "y", epilogue.output_scale ? DType::kInt8 : rounding);
  check.rank(y, "y", 2);
  check.size(y, "y", 0, m);
  check.size(y, "y", 1, n_out);
  check_rows(check, y, "y");
  p.out = y.ptr;
  p.out_row_stride = row_stride(y);
  if (m == 0 || n == 0) return;

  check.aligned(x, "x", kRowAlignment);
  PQ_CHECK(op, p.x_row_stride % kRowAlignment == 0,
           "x: expected a row stride that is a multiple of ", kRowAlignment, ", got ",
           p.x_row_stride);
  const GemmW4Config chosen = from_list(config);
  const size_t needed = gemm_w4_workspace_bytes({m, n, k, static_cast<int>(weight_bits)}, chosen);
  if (needed > 0) {
    PQ_CHECK(op, workspace.has_value(), "workspace: expected one of ", needed, " bytes, got none");
    check.on_cuda(*workspace, "workspace", device);
    check.aligned(*workspace, "workspace", 16);
    const int64_t bytes = workspace->numel() * dtype_bytes(workspace->dtype);
    PQ_CHECK(op, workspace->is_contiguous() && bytes >= static_cast<int64_t>(needed),
             "workspace: expected ", needed, " contiguous bytes, got ", bytes);
    p.workspace = workspace->ptr;
  }
  // A model's weights are written when it is loaded, never by the kernel before in the stream.
  p.weight_is_constant = true;
  launch_gemm_w4(p, chosen, as_stream(stream));
}

}  // namespace prefixquant
