// SPDX-License-Identifier: Apache-2.0
//
// The family's entry points: which kernel for which shape and arch, the argument checks that all
// kernels share, the dispatch. The choice is pure arithmetic and needs no CUDA.
#include "prefixquant/check.h"
#include "prefixquant/gemm_w4.h"
#include "prefixquant/layout_w4.h"

namespace prefixquant {
namespace {

// The last M at which mma.sync is the better choice, with few row tiles and with many (these fill
// the SMs with wgmma tiles too). H100, microseconds, mma.sync / wgmma; geometric mean of nine and
// of three shapes over M = 8 .. 64: 13.31 at the best threshold of the first, 37.01 at that of the
// second.
//                     M = 8        16           24           32           64
//   4096 x 4096       5.1 / 7.0    5.7 / 7.1    7.2 / 7.1    7.7 / 7.0   10.8 / 7.0
//   4096 x 14336     19.2 / 14.5  14.6 / 14.5  16.1 / 14.8  17.0 / 14.8  26.5 / 15.2
//   8192 x 28672     40.9 / 41.1  43.1 / 41.2  57.7 / 40.9  59.5 / 41.0  68.3 / 42.2
//   28672 x 4096     23.5 / 21.6  23.8 / 21.7  24.9 / 21.6  26.0 / 21.6  33.6 / 22.6
//   57344 x 8192     79.3 / 81.3  82.1 / 80.8  84.6 / 80.3  87.4 / 79.9 124.3 / 82.0
constexpr int kLastMmaTokens = 16;
constexpr int kLastMmaTokensManyRows = 4;

bool is_16_bit(GemmDtype dtype) {
  return dtype == GemmDtype::kFloat16 || dtype == GemmDtype::kBFloat16;
}

void check_arguments(const GemmW4Params& p) {
  PQ_REQUIRE(p.m >= 0 && p.n >= 0,
             "gemm_w4: m, n: expected sizes >= 0, got " << p.m << ", " << p.n);
  PQ_REQUIRE(p.k > 0, "gemm_w4: k: expected a positive size, got " << p.k);
  PQ_REQUIRE(p.weight_bits == 4 || p.weight_bits == 8,
             "gemm_w4: weight_bits: expected 4 or 8, got " << p.weight_bits);
  PQ_REQUIRE(p.x_row_stride >= p.k,
             "gemm_w4: x: expected a row stride of at least " << p.k << ", got " << p.x_row_stride);
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
  const bool many_rows = shape.n >= 2 * 64 * sm_count;
  if (arch == 90 && shape.m <= (many_rows ? kLastMmaTokensManyRows : kGemvStreamTokens)) {
    const GemmW4Config stream = choose_gemm_w4_stream_config(shape, sm_count);
    if (stream.stages > 0) return stream;
  }
  if (arch == 90 && shape.m > (many_rows ? kLastMmaTokensManyRows : kLastMmaTokens))
    return choose_gemm_w4_sm90_config(shape, sm_count);
  return choose_gemm_w4_mma_config(shape, sm_count, arch);
}

size_t gemm_w4_workspace_bytes(const GemmW4Shape& shape, const GemmW4Config& config) {
  switch (config.kernel) {
    case GemmW4Kernel::kWgmmaSm90:
      return gemm_w4_sm90_workspace_bytes(shape, config);
    case GemmW4Kernel::kMmaInt4Sm80:
      return gemm_w4_sm80_workspace_bytes(shape, config);
    default:
      return gemm_w4_mma_workspace_bytes(shape, config);
  }
}

void launch_gemm_w4(const GemmW4Params& params, const GemmW4Config& config, cudaStream_t stream) {
  check_arguments(params);
  switch (config.kernel) {
    case GemmW4Kernel::kGemv:
    case GemmW4Kernel::kMmaSkinny:
    case GemmW4Kernel::kMmaTiled:
      return launch_gemm_w4_mma(params, config, stream);
    case GemmW4Kernel::kWgmmaSm90:
      return launch_gemm_w4_sm90(params, config, stream);
    case GemmW4Kernel::kMmaInt4Sm80:
      return launch_gemm_w4_sm80(params, config, stream);
    case GemmW4Kernel::kGemvStream:
      return launch_gemm_w4_stream(params, config, stream);
  }
  throw std::invalid_argument("gemm_w4: config: unknown kernel");
}

}  // namespace prefixquant
