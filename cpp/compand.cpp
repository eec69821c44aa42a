// SPDX-License-Identifier: Apache-2.0
// compand_: every integer becomes the nearest of +-5, 14, 25, 38, 53, 72, 95, 126, in place; 0
// becomes 5.
//   q int8, any shape, contiguous.
#include "isa.h"
#include "ops.h"
#include "rows.h"

namespace prefixquant {

using CompandKernel = void(int8_t* q, int64_t begin, int64_t end);
PQ_KERNEL_TABLE(CompandKernel, compand_levels);

void compand(const TensorView& q) {
  const ArgumentChecker check{"compand_"};
  check.on_cpu(q, "q");
  check.dtype(q, "q", DType::kInt8);
  check.contiguous(q, "q");
  constexpr int64_t kPiece = 4096;  // what is split among threads
  const int64_t count = q.numel();
  const auto kernel = compand_levels_table.pick();
  for_row_ranges((count + kPiece - 1) / kPiece, kPiece / 4, 0,
                 [&](int64_t begin, int64_t end, float*) {
                   kernel(q.data<int8_t>(), begin * kPiece, std::min(end * kPiece, count));
                 });
}

}  // namespace prefixquant
