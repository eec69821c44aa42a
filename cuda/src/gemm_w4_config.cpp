// SPDX-License-Identifier: Apache-2.0
//
// GemmW4Config as data: equality and printing. Needs no CUDA.
#include <ostream>

#include "prefixquant/gemm_w4.h"

namespace prefixquant {

bool operator==(const GemmW4Config& a, const GemmW4Config& b) {
  return a.kernel == b.kernel && a.block_rows == b.block_rows && a.block_tokens == b.block_tokens &&
         a.stages == b.stages && a.cluster == b.cluster && a.grid == b.grid &&
         a.split_k == b.split_k && a.stream_k_tiles == b.stream_k_tiles &&
         a.release_stages == b.release_stages;
}

const char* gemm_w4_kernel_name(GemmW4Kernel kernel) {
  switch (kernel) {
    case GemmW4Kernel::kGemv:
      return "gemv";
    case GemmW4Kernel::kMmaSkinny:
      return "mma_skinny";
    case GemmW4Kernel::kMmaTiled:
      return "mma_tiled";
    case GemmW4Kernel::kWgmmaSm90:
      return "wgmma_sm90";
    case GemmW4Kernel::kMmaInt4Sm80:
      return "mma_int4_sm80";
    case GemmW4Kernel::kGemvStream:
      return "gemv_stream";
  }
  return "unknown";
}

std::ostream& operator<<(std::ostream& os, const GemmW4Config& c) {
  os << "{" << gemm_w4_kernel_name(c.kernel) << ", tile " << c.block_rows << "x" << c.block_tokens
     << ", stages " << c.stages << ", cluster " << c.cluster << ", grid " << c.grid << ", split_k "
     << c.split_k << ", stream_k_tiles " << c.stream_k_tiles;
  if (c.kernel == GemmW4Kernel::kGemvStream) os << ", release_stages " << c.release_stages;
  return os << "}";
}

}  // namespace prefixquant
