// SPDX-License-Identifier: Apache-2.0
// The part of prefixquant._C that works on a KV cache of slots; see bindings.cpp.
#include "ops.h"
#include "tensor_caster.h"

namespace py = pybind11;
namespace pq = prefixquant;
using py::arg;

void bind_cache(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("rope_kv_append", &pq::rope_kv_append, arg("qkv"), arg("cos"), arg("sin"), arg("positions"),
        arg("q_norm"), arg("k_norm"), arg("eps"), arg("signs"), arg("rotation_size"),
        arg("k_scale"), arg("v_scale"), arg("kv_bits"), arg("k_cache"), arg("v_cache"),
        arg("slots"), arg("heads"), arg("q"), nogil);
  m.def("kv_decode_attention", &pq::kv_decode_attention, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k_scale"), arg("v_scale"), arg("prefix_k"), arg("prefix_v"), arg("lengths"),
        arg("block_table"), arg("kv_bits"), arg("max_length"), arg("scaling"), arg("output_scale"),
        arg("output_bits"), arg("out"), nogil);
  m.def("kv_prefill_attention", &pq::kv_prefill_attention, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k_scale"), arg("v_scale"), arg("prefix_k"), arg("prefix_v"), arg("kv_bits"),
        arg("start"), arg("scaling"), arg("sequence"), arg("block_table"), arg("out"), nogil);
}
