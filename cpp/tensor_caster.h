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
    for (DType candidate :
         {DType::kUInt8, DType::kInt8, DType::kInt32, DType::kInt64, DType::kFloat16,
          DType::kBFloat16, DType::kFloat32, DType::kFloat64, DType::kBool}) {
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

  // One call of an operation reads some 25 attributes: names are interned once and looked up
  // through the C API, which is quicker than pybind11's attr().
  bool load(handle src, bool /*convert*/) {
    static PyObject* const kDataPtr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const kDtype = PyUnicode_InternFromString("dtype");
    static PyObject* const kShape = PyUnicode_InternFromString("shape");
    static PyObject* const kStride = PyUnicode_InternFromString("stride");
    static PyObject* const kIsCuda = PyUnicode_InternFromString("is_cuda");
    if (!src || src.is_none()) return false;
    const auto get = [&](PyObject* name) {
      return reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), name));
    };
    const auto call = [&](PyObject* name) {
      return reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), name));
    };
    const object address = call(kDataPtr);
    if (!address) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw error_already_set();
      PyErr_Clear();  // not a tensor
      return false;
    }
    const object dtype = get(kDtype), shape = get(kShape), strides = call(kStride);
    const object is_cuda = get(kIsCuda);
    if (!dtype || !shape || !strides || !is_cuda) throw error_already_set();
    if (!prefixquant::lookup_dtype(dtype.ptr(), &value.dtype)) {
      throw std::invalid_argument("unsupported tensor dtype " + std::string(str(dtype)));
    }
    const auto ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > prefixquant::TensorView::kMaxDims) {
      throw std::invalid_argument("a tensor of " + std::to_string(ndim) +
                                  " dimensions; at most 6 are supported");
    }
    value.ndim = static_cast<int>(ndim);
    for (int i = 0; i < value.ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    value.ptr = PyLong_AsVoidPtr(address.ptr());
    value.device = is_cuda.ptr() == Py_True ? src.attr("get_device")().cast<int>() : -1;
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
