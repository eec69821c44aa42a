// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard.cuh"

#include <algorithm>

#include "prefixquant/launch.h"

namespace prefixquant {

namespace {

constexpr int64_t kReservedSmem = 1024;  // of every CTA, by the system
constexpr int64_t kStaticSmem = 4 * kRmsnormHadamardRows;
constexpr int64_t kGroupBytes = 57344;  // of columns: three CTAs an SM
constexpr int64_t kThreads = 256;       // of a CTA, with many rows

RmsnormHadamardKernel sign_sums_kernel(int64_t k, int64_t segment) {
  switch (k) {
    case 12:
      return rmsnorm_hadamard_instance<SignSums<12, 2>>(segment);
    case 20:
      return rmsnorm_hadamard_instance<SignSums<20, 2>>(segment);
    case 28:
      return rmsnorm_hadamard_instance<SignSums<28, 2>>(segment);
    case 36:
      return rmsnorm_hadamard_instance<SignSums<36, 1>>(segment);
    case 44:
      return rmsnorm_hadamard_instance<SignSums<44, 1>>(segment);
    case 52:
      return rmsnorm_hadamard_instance<SignSums<52, 1>>(segment);
    case 60:
      return rmsnorm_hadamard_instance<SignSums<60, 1>>(segment);
    default:
      return nullptr;
  }
}

RmsnormHadamardKernel butterflies_kernel(int64_t inputs, int64_t segment) {
  switch (inputs) {
    case 1:
      return rmsnorm_hadamard_instance<Butterflies<1>>(segment);
    case 2:
      return rmsnorm_hadamard_instance<Butterflies<2>>(segment);
    case 4:
      return rmsnorm_hadamard_instance<Butterflies<4>>(segment);
    case 8:
      return rmsnorm_hadamard_instance<Butterflies<8>>(segment);
    case 16:
      return rmsnorm_hadamard_instance<Butterflies<16>>(segment);
    default:
      return nullptr;
  }
}

bool fits_vectors(const RmsnormHadamardParams& p) {
  const auto channels = [](const void* pointer, RowDtype dtype) {
    return !pointer ||
           (dtype != RowDtype::kFloat32 && reinterpret_cast<uintptr_t>(pointer) % 16 == 0);
  };
  return hadamard_vectors(p.rows) && p.rows.dtype != RowDtype::kFloat32 &&
         channels(p.weight, p.weight_dtype) && channels(p.shift, p.shift_dtype);
}

// How a row is cut.
struct RowLayout {
  int64_t segment;               // elements that are transformed in registers
  int64_t compiled;              // what the kernels call it
  int vectors;                   // of 8 elements, of a lane in a tile
  RmsnormHadamardKernel kernel;  // nullptr: none is compiled
  RmsnormHadamardBounds bounds;
};

RowLayout layout_of(int64_t k, int64_t pow2, bool few) {
  RowLayout layout;
  layout.segment = std::min<int64_t>(pow2, kMaxSegment);
  if (k == 1 && few && pow2 >= 512 && pow2 <= 4096) layout.segment = 256;
  const bool any = layout.segment < 128 || (k == 1 && pow2 <= 256);
  layout.compiled = any ? 0 : layout.segment;
  layout.vectors = rmsnorm_hadamard_vectors(k, layout.compiled);
  layout.bounds = rmsnorm_hadamard_bounds(k, layout.compiled);
  layout.kernel = nullptr;
  if (layout.segment < 8) return layout;
  if (k == 1) {
    layout.kernel = butterflies_kernel(pow2 / layout.segment, layout.compiled);
  } else if (pow2 == layout.segment) {
    layout.kernel = sign_sums_kernel(k, layout.compiled);
  }
  return layout;
}

struct RowSchedule {
  int group;  // rows of a CTA at a time
  LaunchShape shape;
  int64_t column_bytes;
};

// Few rows: one a CTA, with a warp for each of its tiles. Many: columns for all threads and tiles
// for all warps, as far as shared memory goes, and work for all SMs.
RowSchedule schedule_of(const RowHadamardParams& p, const RowLayout& layout, bool few,
                        const HadamardDevice& device) {
  const HadamardSums* sums = find_hadamard_sums(p.k);
  const int64_t columns = sums->columns * kThreads, elements = layout.segment < 512 ? 6144 : 12288;
  const int64_t wanted =
      std::max((columns + layout.segment - 1) / layout.segment, (elements + p.cols - 1) / p.cols);
  const int64_t fits = std::min<int64_t>(kGroupBytes / (4 * p.cols), kRmsnormHadamardRows);
  const int64_t shared_out = (p.rows + 2 * device.sm_count - 1) / (2 * device.sm_count);
  const int64_t group = few ? 1 : std::max<int64_t>(1, std::min({wanted, fits, shared_out}));
  const int64_t tiles = (group * p.cols + 256 * layout.vectors - 1) / (256 * layout.vectors);
  RowSchedule schedule;
  schedule.group = static_cast<int>(group);
  schedule.shape.block = static_cast<int>(
      few ? std::min<int64_t>(32 * std::max<int64_t>(4, tiles), layout.bounds.threads) : kThreads);
  schedule.column_bytes = (group * p.cols * 4 + 255) / 256 * 256;
  schedule.shape.smem = schedule.column_bytes + group * p.cols;
  const int64_t by_smem =
      (device.smem_limit + kReservedSmem) / (schedule.shape.smem + kStaticSmem + kReservedSmem);
  const int64_t by_registers = layout.bounds.ctas * layout.bounds.threads / schedule.shape.block;
  const int64_t ctas = std::max<int64_t>(1, std::min(by_smem, by_registers));
  schedule.shape.grid = std::min((p.rows + group - 1) / group, ctas * device.sm_count);
  return schedule;
}

RmsnormHadamardArgs make_args(const RmsnormHadamardParams& p, const RowLayout& layout,
                              const RowSchedule& schedule) {
  const RowHadamardParams& h = p.rows;
  RmsnormHadamardArgs a = begin_hadamard_args<RmsnormHadamardArgs>(h);
  a.cols = static_cast<int>(h.cols);
  a.segment = a.columns = static_cast<int>(layout.segment);
  a.log2_columns = log2_of(layout.segment);
  a.group = schedule.group;
  a.blocks = h.rows;
  a.weight = static_cast<const uint16_t*>(p.weight);
  a.shift = static_cast<const uint16_t*>(p.shift);
  a.weight_is_bfloat16 = p.weight_dtype == RowDtype::kBFloat16;
  a.shift_is_bfloat16 = p.shift_dtype == RowDtype::kBFloat16;
  a.vectors_per_block = FastDivisor(static_cast<uint32_t>(h.cols / 8));
  a.squares_at = static_cast<uint32_t>(schedule.column_bytes / 8);
  a.inv_cols = 1.0 / static_cast<double>(h.cols);
  a.eps = p.eps;
  return a;
}

template <typename T>
void launch_generic(const RmsnormHadamardParams& p, const HadamardDevice& device,
                    cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = p.rows.rows;
  shape.block = kHadamardGenericThreads;
  shape.smem = 4 * p.rows.cols;
  PQ_REQUIRE(static_cast<int64_t>(shape.smem) + 512 <= device.smem_limit,
             "rmsnorm_hadamard: x: expected rows of at most "
                 << (device.smem_limit - 512) / 4
                 << " elements, which meet in the shared memory of this device, got "
                 << p.rows.cols);
  launch_dependent(rmsnorm_hadamard_generic_kernel<T>, shape, device.arch, stream, p,
                   hadamard_norm(p.rows), 1.0 / static_cast<double>(p.rows.cols));
}

}  // namespace

void launch_rmsnorm_hadamard(const RmsnormHadamardParams& p, cudaStream_t stream) {
  const RowHadamardParams& h = p.rows;
  const int64_t pow2 = h.k > 0 ? h.cols / h.k : 0;
  PQ_REQUIRE(h.rows >= 0 && h.rows <= 0x7F000000,
             "rmsnorm_hadamard: rows: expected fewer than 2^31, got " << h.rows);
  PQ_REQUIRE(
      h.block_size == h.cols && pow2 > 0 && pow2 * h.k == h.cols && (pow2 & (pow2 - 1)) == 0 &&
          (h.k == 1 || (h.k % 4 == 0 && h.signs)),
      "rmsnorm_hadamard: x: expected rows of a power of two times " << h.k << ", got " << h.cols);
  if (h.rows == 0) return;
  const HadamardDevice device = current_hadamard_device();
  const bool few = h.rows <= 2 * device.sm_count;
  const RowLayout layout = layout_of(h.k, pow2, few);
  if (layout.kernel && fits_vectors(p)) {
    const RowSchedule schedule = schedule_of(h, layout, few, device);
    return launch_dependent(layout.kernel, schedule.shape, device.arch, stream,
                            make_args(p, layout, schedule));
  }
  switch (h.dtype) {
    case RowDtype::kFloat32:
      return launch_generic<float>(p, device, stream);
    case RowDtype::kBFloat16:
      return launch_generic<__nv_bfloat16>(p, device, stream);
    case RowDtype::kFloat16:
      return launch_generic<__half>(p, device, stream);
  }
}

}  // namespace prefixquant
