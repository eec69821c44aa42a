// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_hadamard.cuh"

#include <algorithm>
#include <cmath>

#include "prefixquant/launch.h"

namespace prefixquant {

// Specialized in src/inst/.
#define PQ_DECLARE(...) \
  template <>           \
  RmsnormHadamardKernel rmsnorm_hadamard_instance<__VA_ARGS__>(int vectors)
PQ_DECLARE(Butterflies<1>);
PQ_DECLARE(Butterflies<2>);
PQ_DECLARE(Butterflies<4>);
PQ_DECLARE(Butterflies<8>);
PQ_DECLARE(Butterflies<16>);
PQ_DECLARE(SignSums<12, 2>);
PQ_DECLARE(SignSums<20, 2>);
PQ_DECLARE(SignSums<28, 2>);
PQ_DECLARE(SignSums<36, 1>);
PQ_DECLARE(SignSums<40, 1>);
PQ_DECLARE(SignSums<44, 1>);
PQ_DECLARE(SignSums<52, 1>);
PQ_DECLARE(SignSums<60, 1>);
#undef PQ_DECLARE

namespace {

constexpr int64_t kReservedSmem = 1024;  // of every CTA, by the system
constexpr int64_t kStaticSmem = sizeof(RmsnormHadamardSums) + 64;
constexpr int64_t kGroupBytes = 65536;  // of shared memory: three CTAs an SM

int log2_of(int64_t power_of_two) {
  int result = 0;
  while (int64_t{1} << result < power_of_two) ++result;
  return result;
}

template <int kIndex = 0>
RmsnormHadamardKernel sign_sums_kernel(int64_t k, int vectors) {
  constexpr int kCount = sizeof(kHadamardSums) / sizeof(kHadamardSums[0]);
  if constexpr (kIndex < kCount) {
    constexpr HadamardSums kSums = kHadamardSums[kIndex];
    if constexpr (kSums.k > 1) {
      if (k == kSums.k) return rmsnorm_hadamard_instance<SignSums<kSums.k, kSums.columns>>(vectors);
    }
    return sign_sums_kernel<kIndex + 1>(k, vectors);
  }
  return nullptr;
}

// nullptr: none is compiled.
RmsnormHadamardKernel kernel_of(int64_t k, int64_t pow2, int64_t segment, int vectors) {
  if (k > 1) return pow2 == segment ? sign_sums_kernel(k, vectors) : nullptr;
  switch (pow2 / segment) {
    case 1:
      return rmsnorm_hadamard_instance<Butterflies<1>>(vectors);
    case 2:
      return rmsnorm_hadamard_instance<Butterflies<2>>(vectors);
    case 4:
      return rmsnorm_hadamard_instance<Butterflies<4>>(vectors);
    case 8:
      return rmsnorm_hadamard_instance<Butterflies<8>>(vectors);
    case 16:
      return rmsnorm_hadamard_instance<Butterflies<16>>(vectors);
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
  int64_t segment;               // elements that a warp transforms in registers
  int vectors;                   // of 8 elements, of a lane in a tile
  int64_t tiles;                 // of a row
  RmsnormHadamardKernel kernel;  // nullptr: none is compiled
  int64_t ctas_per_sm;
  int max_threads;

  RowLayout(int64_t k, int64_t pow2) {
    // With k = 1 as short as 16 segments a row allow: they keep the most warps busy.
    segment = k > 1 ? pow2 : std::min(pow2, std::max<int64_t>(256, pow2 / 16));
    vectors = segment <= 256 ? 1 : segment <= 512 ? 2 : 4;
    tiles = (k * pow2 + 256 * vectors - 1) / (256 * vectors);
    kernel =
        segment >= 8 && segment <= kMaxSegment ? kernel_of(k, pow2, segment, vectors) : nullptr;
    const RmsnormHadamardBounds bounds = rmsnorm_hadamard_bounds(k, vectors);
    ctas_per_sm = bounds.ctas;
    max_threads = bounds.threads;
  }
};

struct RowSchedule {
  int group = 1;  // rows of a CTA at a time
  LaunchShape shape;
};

// Few rows: one a CTA, with a warp for each of its tiles. Many: columns for all threads and tiles
// for all warps, as far as shared memory goes, and work for all SMs.
RowSchedule schedule_of(const RowHadamardParams& p, const RowLayout& layout,
                        const HadamardDevice& device) {
  constexpr int64_t kThreads = 256;
  const HadamardSums* sums = find_hadamard_sums(p.k);
  const int64_t columns = sums->columns * kThreads;
  const int64_t wanted = std::max((columns + layout.segment - 1) / layout.segment,
                                  (kThreads / 32 + layout.tiles - 1) / layout.tiles);
  const int64_t fits = std::min({kGroupBytes / (4 * p.cols), kRmsnormHadamardTiles / layout.tiles,
                                 int64_t{kRmsnormHadamardRows}});
  const int64_t shared_out = (p.rows + 2 * device.sm_count - 1) / (2 * device.sm_count);
  RowSchedule schedule;
  schedule.group = static_cast<int>(std::max<int64_t>(1, std::min({wanted, fits, shared_out})));
  const int64_t warps = schedule.group == 1 ? std::max<int64_t>(4, layout.tiles) : kThreads / 32;
  schedule.shape.block = static_cast<int>(std::min<int64_t>(32 * warps, layout.max_threads));
  schedule.shape.smem = (schedule.group * p.cols * 4 + 255) / 256 * 256;
  const int64_t by_smem =
      (device.smem_limit + kReservedSmem) / (schedule.shape.smem + kStaticSmem + kReservedSmem);
  const int64_t by_registers = layout.ctas_per_sm * layout.max_threads / schedule.shape.block;
  const int64_t groups = (p.rows + schedule.group - 1) / schedule.group;
  schedule.shape.grid =
      std::min(groups, std::max<int64_t>(1, std::min(by_smem, by_registers)) * device.sm_count);
  return schedule;
}

RmsnormHadamardArgs make_args(const RmsnormHadamardParams& p, const RowLayout& layout, int group) {
  const RowHadamardParams& h = p.rows;
  RmsnormHadamardArgs a{};
  a.x = static_cast<const uint16_t*>(h.x);
  a.x_stride = h.x_stride;
  a.out = h.out;
  a.scaling = RowScale::kStatic;
  a.scale = h.scale;
  a.qmin = h.qmin;
  a.qmax = h.qmax;
  a.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(h.cols)));
  a.signs = h.signs;
  a.is_bfloat16 = h.dtype == RowDtype::kBFloat16;
  a.block_size = a.cols = static_cast<int>(h.cols);
  a.blocks_per_row = FastDivisor(1);
  a.segment = a.columns = static_cast<int>(layout.segment);
  a.log2_columns = log2_of(layout.segment);
  a.group = group;
  a.blocks = h.rows;
  a.weight = static_cast<const uint16_t*>(p.weight);
  a.shift = static_cast<const uint16_t*>(p.shift);
  a.weight_is_bfloat16 = p.weight_dtype == RowDtype::kBFloat16;
  a.shift_is_bfloat16 = p.shift_dtype == RowDtype::kBFloat16;
  a.vectors = static_cast<int>(h.cols / 8);
  a.tiles_per_row = FastDivisor(static_cast<uint32_t>(layout.tiles));
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
  const double cols = static_cast<double>(p.rows.cols);
  launch_dependent(rmsnorm_hadamard_generic_kernel<T>, shape, device.arch, stream, p,
                   static_cast<float>(1.0 / std::sqrt(cols)), 1.0 / cols);
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
  const RowLayout layout(h.k, pow2);
  if (layout.kernel && fits_vectors(p)) {
    const RowSchedule schedule = schedule_of(h, layout, device);
    return launch_dependent(layout.kernel, schedule.shape, device.arch, stream,
                            make_args(p, layout, schedule.group));
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
