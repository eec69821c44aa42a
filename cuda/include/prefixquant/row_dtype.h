// SPDX-License-Identifier: Apache-2.0
//
// What the row-wise kernels read and write.
#pragma once

namespace prefixquant {

enum class RowDtype : int { kFloat32, kBFloat16, kFloat16 };

enum class RowResult : int {
  kFloat,   // the dtype of the input
  kInt8,    // one level a byte
  kPacked,  // two levels a byte, even index in the low nibble
};

// How levels come about: a scale in device memory for all rows, or max|y| / qmax of each row.
enum class RowScale : int { kNone, kStatic, kDynamic };

}  // namespace prefixquant
