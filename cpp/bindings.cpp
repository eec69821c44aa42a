// SPDX-License-Identifier: Apache-2.0
// The list of what prefixquant._C offers. One line an operation; every argument is named; the GIL
// is released while an operation runs.
#include "isa.h"
#include "ops.h"
#include "tensor_caster.h"

namespace py = pybind11;
namespace pq = prefixquant;
using py::arg;

void bind_cache(py::module_& m);  // bindings_cache.cpp
#ifdef PREFIXQUANT_WITH_CUDA
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = PREFIXQUANT_VERSION;
#ifdef PREFIXQUANT_WITH_CUDA
  m.attr("with_cuda") = true;
  bind_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
  m.def("current_isa", [] { return pq::isa_name(pq::current_isa()); });
  m.def("available_isas", &pq::available_isas);
  m.def("set_isa", &pq::set_isa, arg("name"));

  bind_cache(m);

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("pack_int4", &pq::pack_int4, arg("q"), arg("packed"), nogil);
  m.def("unpack_int4", &pq::unpack_int4, arg("packed"), arg("q"), nogil);
  m.def("prepack_w4", &pq::prepack_w4, arg("weight_packed"), arg("prepacked"), nogil);
  m.def("unprepack_w4", &pq::unprepack_w4, arg("prepacked"), arg("weight_packed"), nogil);
  m.def("prepack_w8", &pq::prepack_w8, arg("weight"), arg("prepacked"), nogil);
  m.def("unprepack_w8", &pq::unprepack_w8, arg("prepacked"), arg("weight"), nogil);
  m.def("gemm_w4", &pq::gemm_w4, arg("x"), arg("weight"), arg("weight_scale"), arg("input_scale"),
        arg("bias"), arg("y"), nogil);
  m.def("gemm_w8", &pq::gemm_w8, arg("x"), arg("weight"), arg("weight_scale"), arg("input_scale"),
        arg("bias"), arg("y"), nogil);
  m.def("quantize_static", &pq::quantize_static, arg("x"), arg("scale"), arg("bits"), arg("q"),
        nogil);
  m.def("compand", &pq::compand, arg("q"), nogil);
  m.def("quantize_dynamic", &pq::quantize_dynamic, arg("x"), arg("bits"), arg("clip"), arg("q"),
        arg("scale"), nogil);
  m.def("rmsnorm", &pq::rmsnorm, arg("x"), arg("weight"), arg("eps"), arg("y"), nogil);
  m.def("add_rmsnorm_quantize", &pq::add_rmsnorm_quantize, arg("residual"), arg("x"), arg("weight"),
        arg("eps"), arg("scale"), arg("bits"), arg("shift"), arg("q"), nogil);
  m.def("rmsnorm_quantize_dynamic", &pq::rmsnorm_quantize_dynamic, arg("x"), arg("weight"),
        arg("eps"), arg("bits"), arg("q"), arg("scale"), nogil);
  m.def("rmsnorm_quantize", &pq::rmsnorm_quantize, arg("x"), arg("weight"), arg("eps"),
        arg("scale"), arg("bits"), arg("shift"), arg("q"), nogil);
  m.def("rmsnorm_hadamard_quantize", &pq::rmsnorm_hadamard_quantize, arg("x"), arg("weight"),
        arg("eps"), arg("signs"), arg("scale"), arg("bits"), arg("shift"), arg("q"), nogil);
  m.def("hadamard", &pq::hadamard, arg("x"), arg("signs"), arg("block_size"), arg("y"), nogil);
  m.def("hadamard_quantize", &pq::hadamard_quantize, arg("x"), arg("signs"), arg("block_size"),
        arg("scale"), arg("bits"), arg("q"), nogil);
  m.def("swiglu_hadamard_quantize", &pq::swiglu_hadamard_quantize, arg("gate"), arg("up"),
        arg("signs"), arg("block_size"), arg("scale"), arg("bits"), arg("q"), nogil);
  m.def("swiglu_hadamard_quantize_dynamic", &pq::swiglu_hadamard_quantize_dynamic, arg("gate"),
        arg("up"), arg("signs"), arg("block_size"), arg("bits"), arg("q"), arg("scale"), nogil);
  m.def("outlier_scan", &pq::outlier_scan, arg("x"), arg("eta"), arg("row_max"), arg("median"),
        arg("is_outlier"), nogil);
  m.def("kv_quantize", &pq::kv_quantize, arg("x"), arg("scale"), arg("bits"), arg("signs"),
        arg("block_size"), arg("shift"), arg("q"), nogil);
  m.def("kv_append", &pq::kv_append, arg("x"), arg("scale"), arg("bits"), arg("signs"),
        arg("block_size"), arg("shift"), arg("cache"), arg("position"), nogil);
  m.def("kv_dequantize", &pq::kv_dequantize, arg("q"), arg("scale"), arg("bits"), arg("y"), nogil);
  m.def("kv_attention", &pq::kv_attention, arg("q"), arg("k"), arg("v"), arg("k_scale"),
        arg("v_scale"), arg("prefix_k"), arg("prefix_v"), arg("mask"), arg("scaling"), arg("out"),
        nogil);
}
