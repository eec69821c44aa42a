// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/hadamard.cuh"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "prefixquant/hadamard_cluster_mma.cuh"
#include "prefixquant/hadamard_generic.cuh"
#include "prefixquant/hadamard_mma.cuh"
#include "prefixquant/hadamard_pair.cuh"
#include "prefixquant/hadamard_registers.cuh"
#include "prefixquant/launch.h"

namespace prefixquant {
namespace {

HadamardArgs make_args(const RowHadamardParams& p, const HadamardConfig& config) {
  HadamardArgs a = begin_hadamard_args<HadamardArgs>(p);
  a.cols = static_cast<int>(p.cols);
  const int64_t pow2 = p.block_size / p.k;
  a.segment = static_cast<int>(pow2 < kMaxSegment ? pow2 : kMaxSegment);
  a.columns = a.segment / config.cluster;
  a.log2_columns = log2_of(a.columns);
  a.group = config.group;
  a.blocks = p.rows * (p.cols / p.block_size);
  a.vectors_per_block =
      FastDivisor(static_cast<uint32_t>(p.block_size / 8 > 0 ? p.block_size / 8 : 1));
  return a;
}

void launch_registers(const RowHadamardParams& p, const HadamardConfig& config, int arch,
                      cudaStream_t stream) {
  HadamardArgs a = make_args(p, config);
  // Here a "block" of the walk is a row, cut into tiles.
  const int64_t tiles = (p.cols + kMaxSegment - 1) / kMaxSegment;
  PQ_REQUIRE(p.rows * tiles <= 0x7FFFFFF0,
             "hadamard: x: expected fewer than 2^31 tiles of 1024 elements");
  a.vectors_per_block = FastDivisor(static_cast<uint32_t>(tiles));
  a.blocks = p.rows;
  LaunchShape shape;
  shape.grid = config.grid;
  shape.block = kHadamardThreads;
  launch_dependent(p.up ? hadamard_registers_kernel<true> : hadamard_registers_kernel<false>, shape,
                   arch, stream, a);
}

template <int kIndex = 0>
HadamardSumsKernel sign_sums_kernel(int64_t k, bool pair, bool swiglu, int columns) {
  constexpr int kCount = sizeof(kHadamardSums) / sizeof(kHadamardSums[0]);
  if constexpr (kIndex < kCount) {
    constexpr HadamardSums kSums = kHadamardSums[kIndex];
    if constexpr (kSums.k > 1) {
      if (k == kSums.k) {
        using Sums = SignSums<kSums.k, kSums.columns>;
        return pair ? hadamard_pair_instance<Sums, kSums.ctas_per_sm>()
                    : hadamard_sums_instance<Sums, kSums.ctas_per_sm, kSums.short_ctas>(swiglu,
                                                                                        columns);
      }
    }
    return sign_sums_kernel<kIndex + 1>(k, pair, swiglu, columns);
  }
  return nullptr;
}

HadamardSumsKernel butterflies_kernel(int64_t inputs, bool swiglu, int columns) {
  constexpr int kCtas = kHadamardSums[0].ctas_per_sm;
  switch (inputs) {
    case 1:
      return hadamard_sums_instance<Butterflies<1>, kCtas, kCtas>(swiglu, columns);
    case 2:
      return hadamard_sums_instance<Butterflies<2>, kCtas, kCtas>(swiglu, columns);
    case 4:
      return hadamard_sums_instance<Butterflies<4>, kCtas, kCtas>(swiglu, columns);
    case 8:
      return hadamard_sums_instance<Butterflies<8>, kCtas, kCtas>(swiglu, columns);
    case 16:
      return hadamard_sums_instance<Butterflies<16>, kCtas, kCtas>(swiglu, columns);
    case 32:
      return hadamard_sums_instance<Butterflies<32>, kCtas, kCtas>(swiglu, columns);
    default:
      return nullptr;
  }
}

LaunchShape shape_of(const HadamardConfig& config) {
  LaunchShape shape;
  shape.grid = config.grid;
  shape.block = config.threads;
  shape.smem = config.smem_bytes;
  shape.cluster = config.cluster;
  return shape;
}

void launch_sums(const RowHadamardParams& p, const HadamardConfig& config, int arch,
                 cudaStream_t stream) {
  const HadamardArgs a = make_args(p, config);
  const HadamardSumsKernel kernel =
      p.k > 1 ? sign_sums_kernel(p.k, config.kernel == HadamardKernel::kPair, p.up, a.columns)
              : butterflies_kernel(p.block_size / a.segment, p.up, a.columns);
  PQ_REQUIRE(kernel, "hadamard: no kernel is compiled for block_size " << p.block_size);
  launch_dependent(kernel, shape_of(config), arch, stream, a);
}

template <int kIndex, int kTiles = kMinHadamardMmaTiles>
HadamardMmaKernel mma_kernel(int tiles, bool swiglu) {
  constexpr HadamardMmaColumns kColumns = kHadamardMmaColumns[kIndex];
  if (tiles == kTiles) return hadamard_mma_instance<kTiles, kColumns.parts, kColumns.tasks>(swiglu);
  if constexpr (kTiles < kMaxHadamardMmaTiles) return mma_kernel<kIndex, kTiles + 1>(tiles, swiglu);
  return nullptr;
}

template <int kSteps = kMinHadamardWgmmaSteps>
HadamardMmaKernel wgmma_kernel(int steps, int pow2, bool swiglu) {
  if (steps == kSteps) {
    if (pow2 == 64) return hadamard_wgmma_instance<kSteps, 64>(swiglu);
    if (pow2 == 128) return hadamard_wgmma_instance<kSteps, 128>(swiglu);
    if constexpr (hadamard_wgmma_is_compiled(kSteps, 256)) {
      return hadamard_wgmma_instance<kSteps, 256>(swiglu);
    }
  }
  if constexpr (kSteps < kMaxHadamardWgmmaSteps) {
    return wgmma_kernel<kSteps + 1>(steps, pow2, swiglu);
  }
  return nullptr;
}

template <int kIndex = 0>
HadamardMmaKernel pair_wgmma_kernel(int64_t k, int pow2, bool swiglu) {
  constexpr HadamardPairBlock kBlock = kHadamardPairBlocks[kIndex];
  if (k == kBlock.k && pow2 == kBlock.pow2) return hadamard_pair_wgmma_instance<kIndex>(swiglu);
  if constexpr (kIndex + 1 < kHadamardPairBlockCount) {
    return pair_wgmma_kernel<kIndex + 1>(k, pow2, swiglu);
  }
  return nullptr;
}

void launch_mma(const RowHadamardParams& p, const HadamardConfig& config, int arch,
                cudaStream_t stream) {
  HadamardMmaArgs a = begin_hadamard_args<HadamardMmaArgs>(p);
  a.k = static_cast<int>(p.k);
  a.blocks = p.rows * (p.cols / p.block_size);
  a.qmin_pair = level_pair(p.qmin), a.qmax_pair = level_pair(p.qmax);
  const int pow2 = a.block_size / a.k, tiles = (a.k + 15) / 16;
  HadamardMmaKernel kernel = nullptr;
  if (config.kernel == HadamardKernel::kWgmma) {
    kernel = wgmma_kernel((a.k + 31) / 32, pow2, p.up);
  } else if (config.kernel == HadamardKernel::kPairWgmma) {
    kernel = pair_wgmma_kernel(p.k, pow2, p.up);
  } else if (pow2 == kHadamardMmaColumns[0].pow2) {
    kernel = mma_kernel<0>(tiles, p.up);
  } else if (pow2 == kHadamardMmaColumns[1].pow2) {
    kernel = mma_kernel<1>(tiles, p.up);
  } else if (pow2 == kHadamardMmaColumns[2].pow2) {
    kernel = mma_kernel<2>(tiles, p.up);
  }
  PQ_REQUIRE(kernel, "hadamard: no kernel is compiled for block_size " << p.block_size);
  launch_dependent(kernel, shape_of(config), arch, stream, a);
}

HadamardClusterKernel cluster_mma_kernel(int64_t k) {
  switch (hadamard_cluster_steps(k)) {
    case 3:
      return hadamard_cluster_mma_instance<3>();
    case 4:
      return hadamard_cluster_mma_instance<4>();
    case 5:
      return hadamard_cluster_mma_instance<5>();
    default:
      return hadamard_cluster_mma_instance<6>();
  }
}

template <int kThreads>
HadamardClusterKernel cluster_kernel(const RowHadamardParams& p) {
  if (p.k == 1) return hadamard_cluster_instance<0, kThreads>();
  switch (p.block_size / p.k / kHadamardTile) {
    case 2:
      return hadamard_cluster_instance<2, kThreads>();
    case 4:
      return hadamard_cluster_instance<4, kThreads>();
    default:
      return hadamard_cluster_instance<1, kThreads>();
  }
}

void launch_cluster(const RowHadamardParams& p, const HadamardConfig& config, int arch,
                    cudaStream_t stream) {
  HadamardClusterArgs a = begin_hadamard_args<HadamardClusterArgs>(p);
  a.k = static_cast<int>(p.k);
  a.pow2 = a.block_size / a.k;
  const int width = std::min(a.pow2, kHadamardTile);
  a.log2_width = log2_of(width);
  a.log2_cluster = log2_of(config.cluster);
  a.log2_owned = a.log2_width - a.log2_cluster;
  a.log2_rows = log2_of(a.pow2 / width);
  a.pick_vectors = FastDivisor(static_cast<uint32_t>((a.k + 15) / 16));
  a.smem = plan_hadamard_cluster_smem(p.block_size, p.k, config.cluster);
  const HadamardClusterKernel kernel = hadamard_sums_are_integers(p.k) ? cluster_mma_kernel(p.k)
                                       : config.threads == 1024        ? cluster_kernel<1024>(p)
                                                                       : cluster_kernel<512>(p);
  launch_dependent(kernel, shape_of(config), arch, stream, a);
}

template <typename T>
void launch_generic(const RowHadamardParams& p, const HadamardConfig& config, int arch,
                    cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = config.grid;
  shape.block = kHadamardGenericThreads;
  shape.smem = config.smem_bytes;
  launch_dependent(hadamard_generic_kernel<T>, shape, arch, stream, p, config.group,
                   hadamard_norm(p));
}

// The rows from `first` on.
RowHadamardParams rows_from(const RowHadamardParams& p, int64_t first) {
  const int64_t bytes = p.dtype == RowDtype::kFloat32 ? 4 : 2;
  const int64_t out_bytes = p.scaling == RowScale::kNone ? bytes : 1;
  RowHadamardParams rest = p;
  rest.x = static_cast<const char*>(p.x) + first * p.x_stride * bytes;
  if (p.up) rest.up = static_cast<const char*>(p.up) + first * p.up_stride * bytes;
  rest.out = static_cast<char*>(p.out) + first * p.cols * out_bytes;
  if (p.row_scale) rest.row_scale = p.row_scale + first;
  rest.rows -= first;
  return rest;
}

// Asked once a device: it is the same for all kernels of kCluster.
int max_cluster_of(const CurrentDevice& current) {
  if (current.arch < 90) return 1;
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int index = 0;
  PQ_CUDA_CHECK(cudaGetDevice(&index));
  int largest = index < kDevices ? known[index].load() : 0;
  if (largest == 0) {
    largest = largest_cluster(hadamard_cluster_instance<1, 512>(), 512);
    if (index < kDevices) known[index].store(largest);
  }
  return largest;
}

}  // namespace

HadamardDevice current_hadamard_device() {
  const CurrentDevice current;
  return {current.arch, current.sm_count, current.smem_limit, max_cluster_of(current)};
}

void launch_hadamard(const RowHadamardParams& p, cudaStream_t stream) {
  const int64_t pow2 = p.k > 0 ? p.block_size / p.k : 0;
  PQ_REQUIRE(p.rows >= 0 && p.cols >= 1, "hadamard: x: expected rows of 1 element or more");
  PQ_REQUIRE(pow2 > 0 && pow2 * p.k == p.block_size && (pow2 & (pow2 - 1)) == 0 &&
                 (p.k == 1 || (p.k % 4 == 0 && p.signs)) && p.cols % p.block_size == 0,
             "hadamard: block_size: expected a power of two times "
                 << p.k << " that divides " << p.cols << ", got " << p.block_size);
  if (p.rows == 0) return;
  const HadamardDevice device = current_hadamard_device();
  const HadamardConfig config = choose_hadamard_config(p, hadamard_vectors(p), device);
  PQ_REQUIRE(config.smem_bytes + 512 <= device.smem_limit,
             "hadamard: block_size: expected at most "
                 << (device.smem_limit - 512) / 4
                 << " elements that meet in the shared memory of this device"
                 << (p.scaling == RowScale::kDynamic ? " (a whole row for dynamic scales)" : "")
                 << ", got " << config.smem_bytes / 4);
  launch_hadamard(p, config, stream);
}

void launch_hadamard(const RowHadamardParams& p, const HadamardConfig& config,
                     cudaStream_t stream) {
  PQ_REQUIRE(config.grid > 0 && config.grid <= 0x7FFFFFFF,
             "hadamard: x: expected fewer than 2^31 blocks");
  if (config.last > 0) {
    HadamardConfig most = config;
    most.last = 0;
    const RowHadamardParams last = rows_from(p, p.rows - config.last);
    RowHadamardParams first = p;
    first.rows -= config.last;
    launch_hadamard(first, most, stream);
    launch_hadamard(last, stream);
    return;
  }
  const int arch = CurrentDevice().arch;
  switch (config.kernel) {
    case HadamardKernel::kRegisters:
      return launch_registers(p, config, arch, stream);
    case HadamardKernel::kSums:
    case HadamardKernel::kPair:
      return launch_sums(p, config, arch, stream);
    case HadamardKernel::kMma:
    case HadamardKernel::kWgmma:
    case HadamardKernel::kPairWgmma:
      return launch_mma(p, config, arch, stream);
    case HadamardKernel::kCluster:
      return launch_cluster(p, config, arch, stream);
    case HadamardKernel::kGeneric:
      break;
  }
  switch (p.dtype) {
    case RowDtype::kFloat32:
      return launch_generic<float>(p, config, arch, stream);
    case RowDtype::kBFloat16:
      return launch_generic<__nv_bfloat16>(p, config, arch, stream);
    case RowDtype::kFloat16:
      return launch_generic<__half>(p, config, arch, stream);
  }
}

}  // namespace prefixquant
