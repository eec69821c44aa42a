// SPDX-License-Identifier: Apache-2.0
// The list of what prefixquant._C offers. One line an operation; every argument is named; the GIL is
// released while an operation runs.
#include "isa.h"
#include "ops.h"
#include "tensor_caster.h"

namespace py = pybind11;
namespace pq = prefixquant;
using py::arg;

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = PREFIXQUANT_VERSION;
#ifdef PREFIXQUANT_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def("current_isa", [] { return pq::isa_name(pq::current_isa()); });
  m.def("available_isas", &pq::available_isas);
  m.def("set_isa", &pq::set_isa, arg("name"));

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("pack_int4", &pq::pack_int4, arg("q"), arg("packed"), nogil);
  m.def("unpack_int4", &pq::unpack_int4, arg("packed"), arg("q"), nogil);
}
