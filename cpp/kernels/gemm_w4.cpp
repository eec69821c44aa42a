// SPDX-License-Identifier: Apache-2.0
// GEMM of int8 activations with 4-bit weights: W4A8, and W4A4 whose activations are int8
// containers.
#include "gemm_driver.h"

PQ_ISA_NAMESPACE_BEGIN

void gemm_w4_kernel(const GemmParams& p) { gemm<WeightW4>(p); }

OutputRange gemm_w4_share(const GemmParams& p, int64_t id, int64_t team) {
  return gemm_share<WeightW4>(p, id, team);
}

PQ_ISA_NAMESPACE_END
