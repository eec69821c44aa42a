// SPDX-License-Identifier: Apache-2.0
// The tensors of a DecoderStep: checked once, kept as pointers.
#include "argument_checks.h"
#include "decoder_step.h"
#include "isa.h"
#include "kv_cache.h"
#include "rows.h"

namespace prefixquant {
namespace {

constexpr const char* kOp = "DecoderStep";

// hadamard_params with the picks kept in `picks`.
HadamardParams plan_rotation(const RotationTensors& rotation, int64_t width, const char* name,
                             std::vector<uint8_t>& picks) {
  const ArgumentChecker check{kOp};
  const int64_t size = rotation.size;
  PQ_CHECK(kOp, size >= 1 && width % size == 0, name, ": expected a size that divides ", width,
           ", got ", size);
  const std::string expected = std::string(name) + ": expected";
  HadamardParams params = hadamard_params(check, rotation.signs, size, expected.c_str());
  if (params.picks) {
    picks.assign(params.picks, params.picks + params.k * params.k / 4);
    params.picks = picks.data();
  }
  return params;
}

void check_table(const ArgumentChecker& check, const TensorView& t, const char* name, int64_t dim) {
  check.on_cpu(t, name);
  check.dtype(t, name, DType::kFloat32);
  check.rank(t, name, 2);
  check.size(t, name, 1, dim);
  check.contiguous(t, name);
}

}  // namespace

DecoderStep::DecoderStep(const DecoderSizes& sizes, const TensorView& cos, const TensorView& sin,
                         const RotationTensors& rotation, const RotationTensors& mlp,
                         const RotationTensors& attention, const RotationTensors& norm)
    : sizes_(sizes) {
  const ArgumentChecker check{kOp};
  PQ_CHECK(kOp, sizes.hidden > 0 && sizes.intermediate > 0 && sizes.head_dim > 0,
           "sizes: expected sizes above 0");
  PQ_CHECK(kOp, sizes.kv_heads > 0 && sizes.heads > 0 && sizes.heads % sizes.kv_heads == 0,
           "heads: expected a multiple of kv_heads ", sizes.kv_heads, ", got ", sizes.heads);
  for (int64_t bits : {sizes.weight_bits, sizes.activation_bits}) {
    PQ_CHECK(kOp, bits == 4 || bits == 8, "bits: expected 4 or 8, got ", bits);
  }
  PQ_CHECK(kOp, !sizes.companded || sizes.activation_bits == 8,
           "companded: expected activations in 8 bits, got ", sizes.activation_bits);
  PQ_CHECK(kOp, sizes.hidden % 2 == 0 && sizes.intermediate % 2 == 0 && sizes.head_dim % 2 == 0,
           "sizes: expected even sizes");
  check_table(check, cos, "cos", sizes.head_dim);
  check_table(check, sin, "sin", sizes.head_dim);
  check.same_shape(sin, "sin", cos, "cos");
  cos_ = cos.data<float>();
  sin_ = sin.data<float>();
  positions_ = cos.size(0);
  PQ_CHECK(kOp, rotation.size == 1 || rotation.size == sizes.head_dim,
           "rotation_size: expected 1 or ", sizes.head_dim, ", got ", rotation.size);
  PQ_CHECK(kOp, norm.size == 1 || norm.size == sizes.hidden, "norm_size: expected 1 or ",
           sizes.hidden, ", got ", norm.size);
  const int64_t attended = sizes.heads * sizes.head_dim;
  rotation_ = plan_rotation(rotation, sizes.head_dim, "rotation_size", rotation_picks_);
  mlp_rotation_ = plan_rotation(mlp, sizes.intermediate, "mlp_size", mlp_picks_);
  attention_rotation_ = plan_rotation(attention, attended, "attention_size", attention_picks_);
  norm_rotation_ = plan_rotation(norm, sizes.hidden, "norm_size", norm_picks_);
  qkv_.resize(kMaxRows * (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim);
  q_.resize(kMaxRows * attended);
  y_.resize(kMaxRows * sizes.hidden);
  gate_up_.resize(kMaxRows * 2 * sizes.intermediate);
  x_.resize(kMaxRows * std::max({sizes.hidden, sizes.intermediate, attended}));
  if (attention.size > 1 || sizes.companded) {
    attended_.resize(kMaxRows * attended);
  } else {
    attended_levels_.resize(kMaxRows * attended);
  }
}

DecoderStep::LinearPlan DecoderStep::plan_linear(const LinearTensors& t, const char* name,
                                                 int64_t n, int64_t k) const {
  const ArgumentChecker check{kOp};
  const int64_t bits = sizes_.weight_bits;
  const int64_t blocks = (n + kBlockOutputs - 1) / kBlockOutputs;
  const int64_t groups = (k + kPadInputs - 1) / kPadInputs * (kPadInputs / kGroupInputs);
  check.on_cpu(t.weight, name);
  check.dtype(t.weight, name, DType::kUInt8);
  check.contiguous(t.weight, name);
  PQ_CHECK(kOp,
           t.weight.ndim == 3 && t.weight.size(0) == blocks && t.weight.size(1) == groups &&
               t.weight.size(2) == kBlockOutputs * bits,
           name, ": expected a prepacked weight of shape [", blocks, ", ", groups, ", ",
           kBlockOutputs * bits, "], got ", t.weight.shape_text());
  check_vector(check, t.weight_scale, name, DType::kFloat32, n);
  if (t.bias) check_vector(check, *t.bias, name, DType::kFloat32, n);
  LinearPlan plan{};
  plan.input = quantizer_params(check, t.input_scale, sizes_.activation_bits);
  plan.gemm.weight = t.weight.data<uint8_t>();
  plan.gemm.weight_scale = t.weight_scale.data<float>();
  plan.gemm.input_scale = *t.input_scale.data<float>();
  plan.gemm.bias = t.bias ? t.bias->data<float>() : nullptr;
  plan.gemm.output_dtype = GemmOutput::kFloat32;
  plan.gemm.n = n;
  plan.gemm.k = k;
  return plan;
}

void DecoderStep::plan_attention(const AttentionTensors& t, Block& block) const {
  const ArgumentChecker check{kOp};
  const int64_t dim = sizes_.head_dim;
  const CacheView cache(check, t.k_cache, t.v_cache, t.k_scale, t.v_scale, sizes_.kv_bits, dim);
  PQ_CHECK(kOp, cache.kv_heads == sizes_.kv_heads, "k_cache: expected ", sizes_.kv_heads,
           " heads, got shape ", t.k_cache.shape_text());
  PQ_CHECK(kOp, t.q_norm.has_value() == t.k_norm.has_value(),
           "k_norm: expected with q_norm or without it, got only one of the two");
  RopeKvRows& rope = block.rope;
  for (const OptionalTensor* norm : {&t.q_norm, &t.k_norm}) {
    if (!norm->has_value()) continue;
    rope.norm_type = float_type(check, **norm, "q_norm");
    check_vector(check, **norm, "q_norm", t.q_norm->dtype, dim);
  }
  KvAttentionParams& p = block.attention;
  p.prefix_type = float_type(check, t.prefix_k, "prefix_k");
  for (const TensorView* prefix : {&t.prefix_k, &t.prefix_v}) {
    check.on_cpu(*prefix, "prefix");
    check.dtype(*prefix, "prefix", t.prefix_k.dtype);
    check.rank(*prefix, "prefix", 3);
    check.size(*prefix, "prefix", 0, sizes_.kv_heads);
    check.size(*prefix, "prefix", 2, dim);
    check.same_shape(*prefix, "prefix", t.prefix_k, "prefix_k");
    check.contiguous(*prefix, "prefix");
  }
  const float* k_scale = t.k_scale && cache.bits < 16 ? t.k_scale->data<float>() : nullptr;
  const float* v_scale = t.v_scale && cache.bits < 16 ? t.v_scale->data<float>() : nullptr;

  rope.type = FloatType::kFloat32;
  rope.heads = sizes_.heads;
  rope.kv_heads = sizes_.kv_heads;
  rope.dim = dim;
  rope.qkv_stride = (sizes_.heads + 2 * sizes_.kv_heads) * dim;
  rope.cos = cos_;
  rope.sin = sin_;
  rope.q_norm = t.q_norm ? t.q_norm->ptr : nullptr;
  rope.k_norm = t.k_norm ? t.k_norm->ptr : nullptr;
  rope.eps = sizes_.eps;
  rope.rotation = rotation_;
  rope.k_shift = head_shift(check, t.k_shift, "k_shift", sizes_.kv_heads, dim);
  rope.kv_bits = cache.bits;
  rope.k_scale = k_scale;
  rope.v_scale = v_scale;
  rope.k_cache = t.k_cache.ptr;
  rope.v_cache = t.v_cache.ptr;
  rope.cache_type = cache.type;
  copy_strides(t.k_cache, rope.k_strides);
  copy_strides(t.v_cache, rope.v_strides);
  rope.page_size = cache.page_size;

  p.q_type = FloatType::kFloat32;
  p.q_strides[0] = sizes_.heads * dim;
  p.q_strides[1] = dim;
  p.k = t.k_cache.ptr;
  p.v = t.v_cache.ptr;
  copy_strides(t.k_cache, p.k_strides);
  copy_strides(t.v_cache, p.v_strides);
  p.bits = cache.bits;
  p.cache_type = cache.type;
  p.k_scale = k_scale;
  p.v_scale = v_scale;
  p.page_size = cache.page_size;
  p.prefix_k = t.prefix_k.ptr;
  p.prefix_v = t.prefix_v.ptr;
  p.prefix = t.prefix_k.size(1);
  p.output_quantized = attended_.empty();
  p.output_quantizer = block.o.input;
  p.scaling = static_cast<float>(sizes_.scaling);
  p.kv_heads = sizes_.kv_heads;
  p.group = sizes_.heads / sizes_.kv_heads;
  p.tokens = 1;
  p.dim = dim;
  p.max_threads = 1;
  block.pages = cache.pages;
}

void DecoderStep::add_block(const OptionalTensor& input_norm, const OptionalTensor& input_shift,
                            const LinearTensors& qkv, const AttentionTensors& attention,
                            const LinearTensors& o, const OptionalTensor& post_norm,
                            const OptionalTensor& post_shift, const LinearTensors& gate_up,
                            const LinearTensors& down) {
  const int64_t attended = sizes_.heads * sizes_.head_dim;
  const auto channels = [&](const OptionalTensor& t, const char* name) {
    return checked_channels(ArgumentChecker{kOp}, t, name, sizes_.hidden);
  };
  Block block{};
  block.input_norm = {channels(input_norm, "input_norm"), channels(input_shift, "input_shift")};
  block.post_norm = {channels(post_norm, "post_norm"), channels(post_shift, "post_shift")};
  block.qkv =
      plan_linear(qkv, "qkv", attended + 2 * sizes_.kv_heads * sizes_.head_dim, sizes_.hidden);
  block.o = plan_linear(o, "o", sizes_.hidden, attended);
  block.gate_up = plan_linear(gate_up, "gate_up", 2 * sizes_.intermediate, sizes_.hidden);
  block.down = plan_linear(down, "down", sizes_.hidden, sizes_.intermediate);
  plan_attention(attention, block);
  blocks_.push_back(block);
}

void DecoderStep::check_rows(const TensorView& hidden, const TensorView& positions,
                             const TensorView& slots, const TensorView& lengths) const {
  const ArgumentChecker check{kOp};
  check.on_cpu(hidden, "hidden");
  check.dtype(hidden, "hidden", DType::kFloat32);
  check.rank(hidden, "hidden", 2);
  check.size(hidden, "hidden", 1, sizes_.hidden);
  check.contiguous(hidden, "hidden");
  const int64_t rows = hidden.size(0);
  PQ_CHECK(kOp, rows <= kMaxRows, "hidden: expected at most ", kMaxRows, " rows, got shape ",
           hidden.shape_text());
  check_vector(check, positions, "positions", DType::kInt32, rows);
  check_vector(check, slots, "slots", DType::kInt64, rows);
  check_vector(check, lengths, "lengths", DType::kInt32, rows);
  PQ_CHECK(kOp, !blocks_.empty(), "expected at least one block");
  const int64_t pages = blocks_[0].pages, page_size = blocks_[0].rope.page_size;
  for (const Block& block : blocks_) {
    PQ_CHECK(kOp, block.pages == pages && block.rope.page_size == page_size,
             "k_cache: expected the same number of pages and rows in every block");
  }
  PQ_CHECK(kOp, rows <= pages, "hidden: expected at most as many rows as the cache has pages, ",
           pages, ", got shape ", hidden.shape_text());
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t position = positions.data<int32_t>()[row], length = lengths.data<int32_t>()[row];
    const int64_t slot = slots.data<int64_t>()[row];
    PQ_CHECK(kOp, position >= 0 && position < positions_, "positions: expected 0 to ",
             positions_ - 1, ", got ", position);
    PQ_CHECK(kOp, slot < pages * page_size, "slots: expected slots below ", pages * page_size,
             ", got ", slot);
    PQ_CHECK(kOp, length >= 0 && length <= page_size, "lengths: expected 0 to ", page_size,
             ", got ", length);
  }
}

}  // namespace prefixquant
