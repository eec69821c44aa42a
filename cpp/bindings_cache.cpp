// SPDX-License-Identifier: Apache-2.0
// The part of prefixquant._C that works on a KV cache of slots; see bindings.cpp.
#include <tuple>

#include "decoder_step.h"
#include "ops.h"
#include "tensor_caster.h"

namespace py = pybind11;
namespace pq = prefixquant;
using py::arg;

namespace {

// weight, weight_scale, input_scale, bias
using Linear = std::tuple<pq::TensorView, pq::TensorView, pq::TensorView, pq::OptionalTensor>;
// q_norm, k_norm, k_shift, k_scale, v_scale, prefix_k, prefix_v, k_cache, v_cache
using Attention =
    std::tuple<pq::OptionalTensor, pq::OptionalTensor, pq::OptionalTensor, pq::OptionalTensor,
               pq::OptionalTensor, pq::TensorView, pq::TensorView, pq::TensorView, pq::TensorView>;

pq::LinearTensors linear(const Linear& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

pq::AttentionTensors attention(const Attention& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t),
          std::get<5>(t), std::get<6>(t), std::get<7>(t), std::get<8>(t)};
}

pq::DecoderStep decoder_step(const std::array<int64_t, 8>& sizes, bool companded, double eps,
                             double scaling, const pq::TensorView& cos, const pq::TensorView& sin,
                             const pq::OptionalTensor& rotation_signs, int64_t rotation_size,
                             const pq::OptionalTensor& mlp_signs, int64_t mlp_size,
                             const pq::OptionalTensor& attention_signs, int64_t attention_size,
                             const pq::OptionalTensor& norm_signs, int64_t norm_size) {
  const pq::DecoderSizes all{sizes[0], sizes[1],  sizes[2], sizes[3], sizes[4], sizes[5],
                             sizes[6], companded, sizes[7], eps,      scaling};
  return {all,
          cos,
          sin,
          {rotation_signs, rotation_size},
          {mlp_signs, mlp_size},
          {attention_signs, attention_size},
          {norm_signs, norm_size}};
}

void add_block(pq::DecoderStep& step, const pq::OptionalTensor& input_norm,
               const pq::OptionalTensor& input_shift, const Linear& qkv, const Attention& attended,
               const Linear& o, const pq::OptionalTensor& post_norm,
               const pq::OptionalTensor& post_shift, const Linear& gate_up, const Linear& down) {
  step.add_block(input_norm, input_shift, linear(qkv), attention(attended), linear(o), post_norm,
                 post_shift, linear(gate_up), linear(down));
}

}  // namespace

void bind_cache(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("rope_kv_append", &pq::rope_kv_append, arg("qkv"), arg("cos"), arg("sin"), arg("positions"),
        arg("q_norm"), arg("k_norm"), arg("eps"), arg("signs"), arg("rotation_size"),
        arg("k_shift"), arg("k_scale"), arg("v_scale"), arg("kv_bits"), arg("k_cache"),
        arg("v_cache"), arg("slots"), arg("heads"), arg("q"), nogil);
  m.def("kv_decode_attention", &pq::kv_decode_attention, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k_scale"), arg("v_scale"), arg("prefix_k"), arg("prefix_v"), arg("lengths"),
        arg("block_table"), arg("kv_bits"), arg("max_length"), arg("scaling"), arg("output_scale"),
        arg("output_bits"), arg("out"), nogil);
  m.def("kv_prefill_attention", &pq::kv_prefill_attention, arg("q"), arg("k_cache"), arg("v_cache"),
        arg("k_scale"), arg("v_scale"), arg("prefix_k"), arg("prefix_v"), arg("kv_bits"),
        arg("start"), arg("scaling"), arg("sequence"), arg("block_table"), arg("out"), nogil);

  // sizes: hidden, intermediate, heads, kv_heads, head_dim, bits of weights, activations and K/V
  py::class_<pq::DecoderStep>(m, "DecoderStep")
      .def(py::init(&decoder_step), arg("sizes"), arg("companded"), arg("eps"), arg("scaling"),
           arg("cos"), arg("sin"), arg("rotation_signs"), arg("rotation_size"), arg("mlp_signs"),
           arg("mlp_size"), arg("attention_signs"), arg("attention_size"), arg("norm_signs"),
           arg("norm_size"))
      .def("add_block", &add_block, arg("input_norm"), arg("input_shift"), arg("qkv"),
           arg("attention"), arg("o"), arg("post_norm"), arg("post_shift"), arg("gate_up"),
           arg("down"))
      .def("run", &pq::DecoderStep::run, arg("hidden"), arg("positions"), arg("slots"),
           arg("lengths"), nogil);
}
