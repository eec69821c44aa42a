// SPDX-License-Identifier: Apache-2.0
//
// The family's entry points: which kernel for which shape and arch, the argument checks that all
// kernels share, the dispatch. The choice is pure arithmetic and needs no CUDA.
#include "prefixquant/check.h"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant {
namespace {

// From here on the wgmma tiles win on an H100: at M = 32 mma.sync takes 7.5 / 24.9 / 87.4 us on
// 4096 x 4096 / 28672 x 4096 / 57344 x 8192, at M = 64 10.7 / 32.7 / 117 us.
constexpr int kLastMmaTokensSm90 = 32;

bool is_16_bit(GemmDtype dtype) {
  return dtype == GemmDtype::kFloat16 || dtype == GemmDtype::kBFloat16;
}

void check_arguments(const GemmW4Params& p) {
  PQ_REQUIRE(p.m >= 0 && p.n >= 0, "gemm_w4: m, n: expected sizes >= 0, got " << p.m << ", " << p.n);
  PQ_REQUIRE(p.k > 0, "gemm_w4: k: expected a positive size, got " << p.k);
  PQ_REQUIRE(p.weight_bits == 4 || p.weight_bits == 8,
             "gemm_w4: weight_bits: expected 4 or 8, got " << p.weight_bits);
  PQ_REQUIRE(p.x_row_stride >= p.k, "gemm_w4: x: expected a row stride of at least "
                                        << p.k << ", got " << p.x_row_stride);
  const bool fused = p.swiglu || p.residual != nullptr || p.output_scale != nullptr;
  PQ_REQUIRE(!fused || is_16_bit(p.out_dtype),
             "gemm_w4: out_dtype: swiglu, residual and output_scale need float16 or bfloat16");
  PQ_REQUIRE(p.out_dtype != GemmDtype::kInt32 || p.bias == nullptr,
             "gemm_w4: bias: expected none with int32 output");
  PQ_REQUIRE(!p.swiglu || p.n % 2 == 0, "gemm_w4: swiglu: expected an even n, got " << p.n);
  PQ_REQUIRE(p.bias_dtype != GemmDtype::kInt32, "gemm_w4: bias: expected a floating dtype");
}

}  // namespace

GemmW4Config choose_gemm_w4_config(const GemmW4Shape& shape, int sm_count, int arch) {
  const bool has_int4_mma = arch == 80 || arch == 86 || arch == 87 || arch == 89;
  if (has_int4_mma && shape.weight_bits == 4 && shape.activation_bits == 4)
    return choose_gemm_w4_sm80_config(shape, sm_count);
  if (arch == 90 && shape.m > kLastMmaTokensSm90)
    return choose_gemm_w4_sm90_config(shape, sm_count);
  return choose_gemm_w4_mma_config(shape, sm_count, arch);
}

size_t gemm_w4_workspace_bytes(const GemmW4Shape& shape, const GemmW4Config& config) {
  switch (config.kernel) {
    case GemmW4Kernel::kWgmmaSm90: return gemm_w4_sm90_workspace_bytes(shape, config);
    case GemmW4Kernel::kMmaInt4Sm80: return gemm_w4_sm80_workspace_bytes(shape, config);
    default: return gemm_w4_mma_workspace_bytes(shape, config);
  }
}

void launch_gemm_w4(const GemmW4Params& params, const GemmW4Config& config, cudaStream_t stream) {
  check_arguments(params);
  switch (config.kernel) {
    case GemmW4Kernel::kGemv:
    case GemmW4Kernel::kMmaSkinny:
    case GemmW4Kernel::kMmaTiled: return launch_gemm_w4_mma(params, config, stream);
    case GemmW4Kernel::kWgmmaSm90: return launch_gemm_w4_sm90(params, config, stream);
    case GemmW4Kernel::kMmaInt4Sm80: return launch_gemm_w4_sm80(params, config, stream);
  }
  throw std::invalid_argument("gemm_w4: config: unknown kernel");
}

}  // namespace prefixquant
