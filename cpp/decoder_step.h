// SPDX-License-Identifier: Apache-2.0
// DecoderStep: one token of each of a few sequences through all blocks of a decoder, on the CPU.
//
// Computes what the operations of this package compute one after the other (rmsnorm_quantize or
// with R6 rmsnorm_hadamard_quantize, gemm, rope_kv_append, kv_decode_attention, with R5
// hadamard_quantize, gemm + residual, the norm as before, gemm, swiglu_hadamard_quantize, gemm +
// residual, and compand_ behind every quantization of a companded model, bit for bit), in one
// parallel region with five barriers a block. A small model is done with a block in some 100 us:
// nine calls through Python and as many parallel regions would take longer than the work.
//
// The tensors are given once and must live as long as the object. Not for several threads at once.
#pragma once

#include <vector>

#include "gemm_params.h"
#include "kernels/params.h"
#include "kv_attention_params.h"
#include "tensor_view.h"

namespace prefixquant {

// What all blocks share.
struct DecoderSizes {
  int64_t hidden;
  int64_t intermediate;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t weight_bits;      // 4 or 8
  int64_t activation_bits;  // 4 or 8
  bool companded;           // 8-bit activations to the levels of compand
  int64_t kv_bits;          // 4, 8 or 16
  double eps;
  double scaling;  // of the attention logits
};

// weight prepacked [n, k], weight_scale float32 [n], input_scale float32 [], bias float32 [n].
struct LinearTensors {
  TensorView weight;
  TensorView weight_scale;
  TensorView input_scale;
  OptionalTensor bias;
};

// An online Hadamard, as for hadamard; size 1 is none.
struct RotationTensors {
  OptionalTensor signs;
  int64_t size;
};

struct AttentionTensors {
  OptionalTensor q_norm;  // floating [head_dim]
  OptionalTensor k_norm;
  OptionalTensor k_shift;  // float32 [kv_heads, head_dim]
  OptionalTensor k_scale;  // float32 [kv_heads], absent at 16 bits
  OptionalTensor v_scale;
  TensorView prefix_k;  // floating [kv_heads, P, head_dim]
  TensorView prefix_v;
  TensorView k_cache;  // [pages, kv_heads, page_size, ..], sequence b in page b
  TensorView v_cache;
};

class DecoderStep {
 public:
  static constexpr int64_t kMaxRows = 16;  // sequences of a step

  // cos, sin float32 [positions, head_dim]; rotation R3, mlp R4, attention R5, norm R6.
  DecoderStep(const DecoderSizes& sizes, const TensorView& cos, const TensorView& sin,
              const RotationTensors& rotation, const RotationTensors& mlp,
              const RotationTensors& attention, const RotationTensors& norm);

  // The picks that the blocks point to stay where they are.
  DecoderStep(const DecoderStep&) = delete;
  DecoderStep(DecoderStep&&) = default;

  // The next block; norms and shifts floating [hidden] or absent.
  void add_block(const OptionalTensor& input_norm, const OptionalTensor& input_shift,
                 const LinearTensors& qkv, const AttentionTensors& attention,
                 const LinearTensors& o, const OptionalTensor& post_norm,
                 const OptionalTensor& post_shift, const LinearTensors& gate_up,
                 const LinearTensors& down);

  // hidden float32 [B, hidden], in place; positions int32, slots int64, lengths int32 [B] as for
  // rope_kv_append and kv_decode_attention.
  void run(const TensorView& hidden, const TensorView& positions, const TensorView& slots,
           const TensorView& lengths);

 private:
  struct NormPlan {
    ChannelVector weight, shift;  // [hidden]
  };
  struct LinearPlan {
    GemmParams gemm;  // all but x, y, m and the buffers of a thread
    QuantizerParams input;
  };
  struct Block {
    NormPlan input_norm, post_norm;
    LinearPlan qkv, o, gate_up, down;
    RopeKvRows rope;
    KvAttentionParams attention;
    int64_t pages;
  };
  class Worker;  // one thread of a run

  LinearPlan plan_linear(const LinearTensors& tensors, const char* name, int64_t n,
                         int64_t k) const;
  void plan_attention(const AttentionTensors& tensors, Block& block) const;
  void check_rows(const TensorView& hidden, const TensorView& positions, const TensorView& slots,
                  const TensorView& lengths) const;

  DecoderSizes sizes_;
  const float* cos_;
  const float* sin_;
  int64_t positions_;
  std::vector<uint8_t> rotation_picks_, mlp_picks_, attention_picks_, norm_picks_;
  HadamardParams rotation_, mlp_rotation_, attention_rotation_, norm_rotation_;
  std::vector<Block> blocks_;
  // Shared by the threads of a run, each for kMaxRows rows.
  std::vector<float> qkv_, q_, y_, gate_up_, attended_;
  std::vector<int8_t> x_, attended_levels_;  // attended_ with R5 or companded, or attended_levels_
};

}  // namespace prefixquant
