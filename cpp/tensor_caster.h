// SPDX-License-Identifier: Apache-2.0
// The pybind11 caster torch.Tensor -> TensorView; included by bindings.cpp alone, so no operation
// sees a Python object.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <unordered_map>

#include "tensor_view.h"

namespace prefixquant {

// torch's dtype objects are singletons that live as long as torch: their address identifies them.
inline bool lookup_dtype(PyObject* dtype, DType* out) {
  static std::unordered_map<PyObject*, DType> known;
  auto found = known.find(dtype);
  if (found == known.end()) {
    const std::string name = pybind11::str(pybind11::handle(dtype));
    for (DType candidate : {DType::kUInt8, DType::kInt8, DType::kInt32, DType::kInt64,
                            DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64,
                            DType::kBool}) {
      if (name == std::string("torch.") + dtype_name(candidate)) {
        found = known.emplace(dtype, candidate).first;
      }
    }
    if (found == known.end()) return false;
  }
  *out = found->second;
  return true;
}

}  // namespace prefixquant

namespace pybind11::detail {

template <>
struct type_caster<prefixquant::TensorView> {
  PYBIND11_TYPE_CASTER(prefixquant::TensorView, const_name("torch.Tensor"));

  bool load(handle src, bool /*convert*/) {
    if (!src || src.is_none() || !hasattr(src, "data_ptr")) return false;
    const object dtype = src.attr("dtype");
    if (!prefixquant::lookup_dtype(dtype.ptr(), &value.dtype)) {
      throw std::invalid_argument("unsupported tensor dtype " + std::string(str(dtype)));
    }
    const tuple shape = src.attr("shape");
    const tuple strides = src.attr("stride")();
    value.ndim = static_cast<int>(shape.size());
    if (value.ndim > prefixquant::TensorView::kMaxDims) {
      throw std::invalid_argument("a tensor of " + std::to_string(value.ndim) +
                                  " dimensions; at most 6 are supported");
    }
    for (int i = 0; i < value.ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(shape[i].ptr());
      value.strides[i] = PyLong_AsLongLong(strides[i].ptr());
    }
    value.ptr = PyLong_AsVoidPtr(object(src.attr("data_ptr")()).ptr());
    value.device = src.attr("is_cuda").ptr() == Py_True ? src.attr("get_device")().cast<int>() : -1;
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
