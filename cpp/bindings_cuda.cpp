// SPDX-License-Identifier: Apache-2.0
// The CUDA operations of prefixquant._C: a list, like bindings.cpp.
#include <pybind11/stl.h>

#include "ops_cuda.h"
#include "tensor_caster.h"

namespace py = pybind11;
namespace pq = prefixquant;
using py::arg;

void bind_cuda(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("prepack_cuda", &pq::prepack_cuda, arg("weight"), arg("bits"), arg("prepacked"),
        arg("stream"), nogil);
  m.def("unprepack_cuda", &pq::unprepack_cuda, arg("prepacked"), arg("bits"), arg("weight"),
        arg("stream"), nogil);
  m.def("gemm_config_cuda", &pq::gemm_config_cuda, arg("m"), arg("n"), arg("k"), arg("weight_bits"),
        arg("activation_bits"), arg("sm_count"), arg("arch"), arg("family") = "");
  m.def("gemm_config_text", &pq::gemm_config_text, arg("config"));
  m.def("gemm_plan_cuda", &pq::gemm_plan_cuda, arg("m"), arg("n"), arg("k"), arg("weight_bits"),
        arg("activation_bits"), arg("device"));
  m.def("capture_id_cuda", &pq::capture_id_cuda, arg("stream"));
  m.def("gemm_workspace_cuda", &pq::gemm_workspace_cuda, arg("m"), arg("n"), arg("k"),
        arg("weight_bits"), arg("config"));
  m.def(
      "gemm_cuda",
      [](const pq::TensorView& x, const pq::TensorView& weight, int64_t weight_bits,
         const pq::TensorView& weight_scale, const pq::TensorView& input_scale,
         const pq::OptionalTensor& bias, const pq::OptionalTensor& residual,
         const pq::OptionalTensor& output_scale, const std::string& rounding, int64_t output_bits,
         bool swiglu, const pq::TensorView& y, const pq::OptionalTensor& workspace,
         const pq::GemmConfigList& config, uintptr_t stream) {
        pq::gemm_cuda(x, weight, weight_bits, weight_scale, input_scale, bias,
                      {residual, output_scale, rounding, output_bits, swiglu}, y, workspace, config,
                      stream);
      },
      arg("x"), arg("weight"), arg("weight_bits"), arg("weight_scale"), arg("input_scale"),
      arg("bias"), arg("residual"), arg("output_scale"), arg("rounding"), arg("output_bits"),
      arg("swiglu"), arg("y"), arg("workspace"), arg("config"), arg("stream"), nogil);
  m.def("rope_kv_append_cuda", &pq::rope_kv_append_cuda, arg("qkv"), arg("cos"), arg("sin"),
        arg("positions"), arg("q_norm"), arg("k_norm"), arg("eps"), arg("signs"),
        arg("rotation_size"), arg("k_shift"), arg("k_scale"), arg("v_scale"), arg("kv_bits"),
        arg("k_cache"), arg("v_cache"), arg("slots"), arg("heads"), arg("q"), arg("stream"), nogil);
  m.def("kv_quantize_cuda", &pq::kv_quantize_cuda, arg("op"), arg("x"), arg("scale"), arg("bits"),
        arg("signs"), arg("block_size"), arg("shift"), arg("cache"), arg("position"), arg("stream"),
        nogil);
  m.def("kv_dequantize_cuda", &pq::kv_dequantize_cuda, arg("q"), arg("scale"), arg("bits"),
        arg("block_table"), arg("y"), arg("stream"), nogil);
  m.def("kv_attention_workspace_cuda", &pq::kv_attention_workspace_cuda, arg("batch"),
        arg("tokens"), arg("heads"), arg("kv_heads"), arg("dim"), arg("device"));
  m.def("kv_attention_cuda", &pq::kv_attention_cuda, arg("op"), arg("q"), arg("k"), arg("v"),
        arg("k_scale"), arg("v_scale"), arg("prefix_k"), arg("prefix_v"), arg("lengths"),
        arg("block_table"), arg("mask"), arg("max_length"), arg("scaling"), arg("output_scale"),
        arg("output_bits"), arg("out"), arg("counters"), arg("partials"), arg("stream"), nogil);

  m.def("quantize_static_cuda", &pq::quantize_static_cuda, arg("x"), arg("scale"), arg("bits"),
        arg("q"), arg("stream"), nogil);
  m.def("compand_cuda", &pq::compand_cuda, arg("q"), arg("stream"), nogil);
  m.def("quantize_dynamic_cuda", &pq::quantize_dynamic_cuda, arg("x"), arg("bits"), arg("clip"),
        arg("q"), arg("scale"), arg("stream"), nogil);
  m.def("rmsnorm_cuda", &pq::rmsnorm_cuda, arg("x"), arg("weight"), arg("eps"), arg("y"),
        arg("stream"), nogil);
  m.def("rmsnorm_quantize_cuda", &pq::rmsnorm_quantize_cuda, arg("x"), arg("weight"), arg("eps"),
        arg("scale"), arg("bits"), arg("shift"), arg("q"), arg("stream"), nogil);
  m.def("rmsnorm_quantize_dynamic_cuda", &pq::rmsnorm_quantize_dynamic_cuda, arg("x"),
        arg("weight"), arg("eps"), arg("bits"), arg("q"), arg("scale"), arg("stream"), nogil);
  m.def("add_rmsnorm_quantize_cuda", &pq::add_rmsnorm_quantize_cuda, arg("residual"), arg("x"),
        arg("weight"), arg("eps"), arg("scale"), arg("bits"), arg("shift"), arg("q"), arg("stream"),
        nogil);
  m.def("rmsnorm_hadamard_quantize_cuda", &pq::rmsnorm_hadamard_quantize_cuda, arg("x"),
        arg("weight"), arg("eps"), arg("signs"), arg("scale"), arg("bits"), arg("shift"), arg("q"),
        arg("stream"), nogil);
  m.def("hadamard_cuda", &pq::hadamard_cuda, arg("x"), arg("signs"), arg("block_size"), arg("y"),
        arg("stream"), nogil);
  m.def("hadamard_quantize_cuda", &pq::hadamard_quantize_cuda, arg("x"), arg("signs"),
        arg("block_size"), arg("scale"), arg("bits"), arg("q"), arg("stream"), nogil);
  m.def("swiglu_hadamard_quantize_cuda", &pq::swiglu_hadamard_quantize_cuda, arg("gate"), arg("up"),
        arg("signs"), arg("block_size"), arg("scale"), arg("bits"), arg("q"), arg("stream"), nogil);
  m.def("swiglu_hadamard_quantize_dynamic_cuda", &pq::swiglu_hadamard_quantize_dynamic_cuda,
        arg("gate"), arg("up"), arg("signs"), arg("block_size"), arg("bits"), arg("q"),
        arg("scale"), arg("stream"), nogil);
  m.def("hadamard_compiled_signs", &pq::hadamard_compiled_signs, arg("k"), arg("signs"));
  m.def("outlier_scan_cuda", &pq::outlier_scan_cuda, arg("x"), arg("eta"), arg("row_max"),
        arg("median"), arg("is_outlier"), arg("stream"), nogil);
}
