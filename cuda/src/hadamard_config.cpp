// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "prefixquant/check.h"
#include "prefixquant/hadamard.h"
#include "prefixquant/hadamard_signs.h"

namespace prefixquant {
namespace {

constexpr int64_t kSegment = 1024;       // kMaxSegment of hadamard_tile.cuh
constexpr int64_t kMaxInputs = 32;       // Butterflies<F>
constexpr int64_t kThreads = 256;        // of a CTA
constexpr int64_t kStaticSmem = 512;     // an upper bound of what the kernels have besides
constexpr int64_t kReservedSmem = 1024;  // of every CTA, by the system

// Blocks a CTA takes at a time: enough columns for all its threads and enough segments for all its
// warps, but no more shared memory than three CTAs an SM can have, and work for all SMs.
int64_t choose_group(int64_t block, int64_t segment, int64_t blocks, const HadamardSums& sums,
                     const HadamardDevice& device) {
  const int64_t columns = sums.columns * kThreads / sums.parts;
  const int64_t wanted = std::max((columns + segment - 1) / segment, (12288 + block - 1) / block);
  const int64_t fits = std::max<int64_t>(1, 57344 / (4 * block));
  const int64_t shared_out = std::max<int64_t>(1, blocks / (2 * device.sm_count));
  return std::max<int64_t>(1, std::min({wanted, fits, shared_out}));
}

// CTAs that share a block where blocks are few: one segment or part of one a warp.
int choose_cluster(int64_t block, int64_t segment, int64_t blocks, const HadamardDevice& device) {
  if (device.arch < 90) return 1;
  const int64_t tiles = block / (segment > 512 ? 1024 : 512);
  int cluster = 1;
  while (cluster < 8 && cluster * kThreads / 32 < tiles && segment / (2 * cluster) >= 16 &&
         blocks * 2 * cluster <= device.sm_count) {
    cluster *= 2;
  }
  return cluster;
}

template <int kIndex = 0>
bool write_compiled_signs(int64_t k, int8_t* signs) {
  if constexpr (kIndex < sizeof(kHadamardSums) / sizeof(kHadamardSums[0])) {
    constexpr int K = kHadamardSums[kIndex].k;
    if constexpr (K > 1) {
      if (k == K) {
        const SignMatrix<K> matrix = sign_matrix<K>();
        for (int i = 0; i < K * K; ++i) signs[i] = matrix.minus[i / K][i % K] ? -1 : 1;
        return true;
      }
    }
    return write_compiled_signs<kIndex + 1>(k, signs);
  }
  return false;
}

}  // namespace

bool compiled_hadamard_signs(int64_t k, int8_t* signs) { return write_compiled_signs(k, signs); }

const HadamardSums* find_hadamard_sums(int64_t k) {
  for (const HadamardSums& sums : kHadamardSums) {
    if (sums.k == k) return &sums;
  }
  return nullptr;
}

HadamardConfig choose_hadamard_config(const RowHadamardParams& p, bool vectors,
                                      const HadamardDevice& device) {
  const int64_t block = p.block_size, pow2 = block / p.k, segment = std::min(pow2, kSegment);
  const int64_t inputs = block / segment, blocks_per_row = p.cols / block;
  const int64_t blocks = p.rows * blocks_per_row;
  const bool dynamic = p.scaling == RowScale::kDynamic;
  const bool halves = vectors && p.dtype != RowDtype::kFloat32;
  HadamardConfig config;
  if (halves && p.k == 1 && pow2 <= kSegment && !dynamic) {
    config.kernel = HadamardKernel::kRegisters;
    const int64_t tiles = p.rows * ((p.cols + kSegment - 1) / kSegment);
    config.grid = (tiles + kThreads / 32 - 1) / (kThreads / 32);
    return config;
  }
  const HadamardSums* sums = find_hadamard_sums(p.k);
  const bool compiled = sums && (p.k > 1 ? inputs == p.k : inputs <= kMaxInputs);
  const int64_t group = dynamic    ? blocks_per_row
                        : compiled ? choose_group(block, segment, blocks, *sums, device)
                                   : 1;
  const int64_t smem = group * block * 4;
  if (halves && compiled && segment >= 8 && smem + kStaticSmem <= device.smem_limit) {
    config.kernel = HadamardKernel::kSums;
    config.group = static_cast<int>(group);
    config.cluster = group == 1 ? choose_cluster(block, segment, blocks, device) : 1;
    config.smem_bytes = (smem / config.cluster + 255) / 256 * 256;
    const int64_t groups = (blocks + group - 1) / group;
    const int64_t by_smem =
        (device.smem_limit + kReservedSmem) / (config.smem_bytes + kStaticSmem / 2 + kReservedSmem);
    const int64_t ctas = std::max<int64_t>(1, std::min<int64_t>(by_smem, sums->ctas_per_sm));
    config.grid = config.cluster > 1 ? groups * config.cluster
                                     : std::min<int64_t>(groups, ctas * device.sm_count);
    return config;
  }
  config.group = static_cast<int>(dynamic ? blocks_per_row : 1);
  config.smem_bytes = config.group * block * 4;
  config.grid = (blocks + config.group - 1) / config.group;
  return config;
}

}  // namespace prefixquant
