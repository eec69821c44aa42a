// SPDX-License-Identifier: Apache-2.0
// GEMM of int8 activations with 8-bit weights.
#include "gemm_driver.h"

PQ_ISA_NAMESPACE_BEGIN

void gemm_w8_kernel(const GemmParams& p) { gemm<WeightW8>(p); }

OutputRange gemm_w8_share(const GemmParams& p, int64_t id, int64_t team) {
  return gemm_share<WeightW8>(p, id, team);
}

PQ_ISA_NAMESPACE_END
