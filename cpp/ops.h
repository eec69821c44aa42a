// SPDX-License-Identifier: Apache-2.0
// The operations of the extension. Each checks its arguments and launches; outputs are allocated by
// the caller and passed in. The formula, shapes and dtypes of each are in its .cpp file and in the
// docstring of its Python function (python/prefixquant/ops/).
#pragma once

#include "tensor_view.h"

namespace prefixquant {

// pack_int4.cpp
void pack_int4(const TensorView& q, const TensorView& packed);
void unpack_int4(const TensorView& packed, const TensorView& q);

// gemm_w4.cpp
void prepack_w4(const TensorView& weight_packed, const TensorView& prepacked);
void unprepack_w4(const TensorView& prepacked, const TensorView& weight_packed);
void prepack_w8(const TensorView& weight, const TensorView& prepacked);
void unprepack_w8(const TensorView& prepacked, const TensorView& weight);
void gemm_w4(const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
             const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y);
void gemm_w8(const TensorView& x, const TensorView& weight, const TensorView& weight_scale,
             const TensorView& input_scale, const OptionalTensor& bias, const TensorView& y);

}  // namespace prefixquant
