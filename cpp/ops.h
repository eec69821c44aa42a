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

}  // namespace prefixquant
