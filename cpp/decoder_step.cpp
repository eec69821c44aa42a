// SPDX-License-Identifier: Apache-2.0
// The run of a DecoderStep: what each thread does, block by block.
#include "decoder_step.h"

#include <omp.h>

#include "isa.h"

namespace prefixquant {

using RmsnormKernel = void(const RmsnormRows&, int64_t row_begin, int64_t row_end, float* scratch);
using RmsnormHadamardKernel = void(const RmsnormHadamardRows&, int64_t row_begin, int64_t row_end,
                                   float* scratch);
using HadamardKernel = void(const HadamardRows&, int64_t row_begin, int64_t row_end,
                            float* scratch);
using GemmShare = OutputRange(const GemmParams&, int64_t id, int64_t team);
using RopeHead = void(const RopeKvRows&, int64_t row, int64_t kv_head, float* scratch);
using AttentionTask = void(const KvAttentionParams&, int64_t task);
using CompandKernel = void(int8_t* q, int64_t begin, int64_t end);
PQ_KERNEL_TABLE(RmsnormKernel, rmsnorm_rows);
PQ_KERNEL_TABLE(RmsnormHadamardKernel, rmsnorm_hadamard_rows);
PQ_KERNEL_TABLE(HadamardKernel, hadamard_rows);
PQ_KERNEL_TABLE(GemmShare, gemm_w4_share);
PQ_KERNEL_TABLE(GemmShare, gemm_w8_share);
PQ_KERNEL_TABLE(RopeHead, rope_kv_append_head);
PQ_KERNEL_TABLE(AttentionTask, kv_attention_task);
PQ_KERNEL_TABLE(CompandKernel, compand_levels);

namespace {

// Up to here every thread makes all quantized rows for itself: that takes a microsecond or two, as
// long as the barrier that sharing them would need.
constexpr int64_t kOwnRows = 2;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace

// The pieces of one piece of thread scratch, and the steps of a block on this thread's share.
class DecoderStep::Worker {
 public:
  Worker(DecoderStep& step, float* hidden, int64_t rows, int64_t id, int64_t team)
      : step_(step), hidden_(hidden), rows_(rows), id_(id), team_(team) {
    const DecoderSizes& s = step.sizes_;
    const int64_t widest = s.hidden > s.intermediate ? s.hidden : s.intermediate;
    const int64_t deepest = widest > s.heads * s.head_dim ? widest : s.heads * s.head_dim;
    const int64_t floats = round_up(4 * (deepest + kRowChunk + 16), 16);  // of any row kernel
    const int64_t own = round_up(kOwnRows * deepest, 64);
    const int64_t sums = round_up(kMaxRows * 4, 64), tail = kMaxRows * kPadInputs;
    scratch_ =
        static_cast<float*>(thread_scratch(ScratchSlot::kRowData, floats * 4 + own + sums + tail));
    own_x_ = reinterpret_cast<int8_t*>(scratch_ + floats);
    row_sum_ = reinterpret_cast<int32_t*>(own_x_ + own);
    x_tail_ = own_x_ + own + sums;
  }

  void block(const Block& b, const int32_t* positions, const int64_t* slots,
             const int32_t* lengths) {
    multiply(b.qkv, normalize(b.input_norm, b.qkv), step_.qkv_.data());
    barrier();
    attend(b, positions, slots, lengths);
    barrier();
    multiply_add(b.o, attended(b));
    barrier();
    multiply(b.gate_up, normalize(b.post_norm, b.gate_up), step_.gate_up_.data());
    barrier();
    multiply_add(b.down, gated(b));
    barrier();
  }

 private:
  static void barrier() {
#pragma omp barrier
  }

  // Runs make(row_begin, row_end, int8 output of row 0), rows of `width`, so that this thread sees
  // all rows; compands them where the model's activations are.
  template <typename Make>
  const int8_t* quantized_rows(int64_t width, Make&& make) {
    const auto rows = [&](int64_t begin, int64_t end, int8_t* x) {
      make(begin, end, x);
      if (step_.sizes_.companded) compand_levels_table.pick()(x, begin * width, end * width);
    };
    if (rows_ <= kOwnRows || team_ == 1) {
      int8_t* x = rows_ <= kOwnRows ? own_x_ : step_.x_.data();
      rows(0, rows_, x);
      return x;
    }
    rows(rows_ * id_ / team_, rows_ * (id_ + 1) / team_, step_.x_.data());
    barrier();
    return step_.x_.data();
  }

  // What the kernels of both norms are told alike.
  template <typename Rows>
  Rows norm_rows(const NormPlan& norm, const LinearPlan& next) const {
    Rows p{};
    p.x = hidden_;
    p.x_type = FloatType::kFloat32;
    p.x_stride = p.cols = step_.sizes_.hidden;
    p.weight = norm.weight;
    p.shift = norm.shift;
    p.eps = step_.sizes_.eps;
    p.quantizer = next.input;
    return p;
  }

  const int8_t* normalize(const NormPlan& norm, const LinearPlan& next) {
    if (step_.norm_rotation_.block > 1) return normalize_rotated(norm, next);
    auto p = norm_rows<RmsnormRows>(norm, next);
    p.output = RowOutput::kInt8;
    return quantized_rows(p.cols, [&](int64_t begin, int64_t end, int8_t* x) {
      p.y = x;
      rmsnorm_rows_table.pick()(p, begin, end, scratch_);
    });
  }

  // The norm with R6.
  const int8_t* normalize_rotated(const NormPlan& norm, const LinearPlan& next) {
    auto p = norm_rows<RmsnormHadamardRows>(norm, next);
    p.hadamard = step_.norm_rotation_;
    return quantized_rows(p.cols, [&](int64_t begin, int64_t end, int8_t* x) {
      p.q = x;
      rmsnorm_hadamard_rows_table.pick()(p, begin, end, scratch_);
    });
  }

  // What the o projection reads: the levels that attention left, or those of R5 of its output.
  const int8_t* attended(const Block& b) {
    if (b.attention.output_quantized) return step_.attended_levels_.data();
    HadamardRows p{};
    p.x = step_.attended_.data();
    p.x_type = FloatType::kFloat32;
    p.x_stride = p.cols = step_.sizes_.heads * step_.sizes_.head_dim;
    p.quantized = true;
    p.hadamard = step_.attention_rotation_;
    p.quantizer = b.o.input;
    return quantized_rows(p.cols, [&](int64_t begin, int64_t end, int8_t* x) {
      p.y = x;
      hadamard_rows_table.pick()(p, begin, end, scratch_);
    });
  }

  const int8_t* gated(const Block& b) {
    const int64_t width = step_.sizes_.intermediate;
    HadamardRows p{};
    p.x = step_.gate_up_.data();
    p.x_type = FloatType::kFloat32;
    p.up = step_.gate_up_.data() + width;
    p.x_stride = p.up_stride = 2 * width;
    p.quantized = true;
    p.cols = width;
    p.hadamard = step_.mlp_rotation_;
    p.quantizer = b.down.input;
    return quantized_rows(p.cols, [&](int64_t begin, int64_t end, int8_t* x) {
      p.y = x;
      hadamard_rows_table.pick()(p, begin, end, scratch_);
    });
  }

  // This thread's outputs of x W^T -> y [rows, n].
  OutputRange multiply(const LinearPlan& linear, const int8_t* x, float* y) {
    GemmParams p = linear.gemm;
    p.x = x;
    p.y = y;
    p.m = rows_;
    p.row_sum = row_sum_;
    p.x_tail = x_tail_;
    const auto& table = step_.sizes_.weight_bits == 4 ? gemm_w4_share_table : gemm_w8_share_table;
    return table.pick()(p, id_, team_);
  }

  // hidden += x W^T, each thread its outputs.
  void multiply_add(const LinearPlan& linear, const int8_t* x) {
    const OutputRange mine = multiply(linear, x, step_.y_.data());
    const int64_t width = step_.sizes_.hidden;
    for (int64_t row = 0; row < rows_; ++row) {
      const float* y = step_.y_.data() + row * width;
      float* to = hidden_ + row * width;
      for (int64_t n = mine.first; n < mine.last; ++n) to[n] = y[n] + to[n];
    }
  }

  // A task is one KV head of one sequence: its key and value are appended by the thread that then
  // attends them, so no barrier lies between.
  void attend(const Block& b, const int32_t* positions, const int64_t* slots,
              const int32_t* lengths) {
    RopeKvRows rope = b.rope;
    rope.qkv = step_.qkv_.data();
    rope.positions = positions;
    rope.slots = slots;
    rope.q = step_.q_.data();
    KvAttentionParams p = b.attention;
    p.q = step_.q_.data();
    p.out = p.output_quantized ? static_cast<void*>(step_.attended_levels_.data())
                               : static_cast<void*>(step_.attended_.data());
    p.batch = rows_;
    p.lengths = lengths;
    for (int64_t task = id_; task < rows_ * p.kv_heads; task += team_) {
      rope_kv_append_head_table.pick()(rope, task / p.kv_heads, task % p.kv_heads, scratch_);
      kv_attention_task_table.pick()(p, task);
    }
  }

  DecoderStep& step_;
  float* hidden_;
  int64_t rows_, id_, team_;
  float* scratch_;
  int8_t* own_x_;
  int32_t* row_sum_;
  int8_t* x_tail_;
};

void DecoderStep::run(const TensorView& hidden, const TensorView& positions,
                      const TensorView& slots, const TensorView& lengths) {
  check_rows(hidden, positions, slots, lengths);
  const int64_t rows = hidden.size(0);
  if (rows == 0) return;
#pragma omp parallel
  {
    Worker worker(*this, hidden.data<float>(), rows, omp_get_thread_num(), omp_get_num_threads());
    for (const Block& block : blocks_) {
      worker.block(block, positions.data<int32_t>(), slots.data<int64_t>(),
                   lengths.data<int32_t>());
    }
  }
}

}  // namespace prefixquant
