// SPDX-License-Identifier: Apache-2.0
// compand_ on CUDA: the checks of compand.cpp, then one launch.
#include "prefixquant/compand.h"

#include "ops_cuda.h"
#include "rows_cuda.h"

namespace prefixquant {

void compand_cuda(const TensorView& q, uintptr_t stream) {
  const ArgumentChecker check{"compand_"};
  cuda_device_of(check, q, "q");
  check.dtype(q, "q", DType::kInt8);
  check.contiguous(q, "q");
  launch_compand(q.data<int8_t>(), q.numel(), as_cuda_stream(stream));
}

}  // namespace prefixquant
