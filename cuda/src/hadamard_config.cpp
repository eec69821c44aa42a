// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>

#include "prefixquant/check.h"
#include "prefixquant/hadamard.h"
#include "prefixquant/hadamard_signs.h"

namespace prefixquant {
namespace {

constexpr int64_t kSegment = 1024;     // kMaxSegment of hadamard_tile.cuh
constexpr int64_t kLongSegment = 512;  // shorter ones are kernels of their own
constexpr int64_t kTile = 256;         // of hadamard_cluster.cuh
constexpr int64_t kMaxInputs = 32;     // Butterflies<F>
constexpr int64_t kThreads = 256;      // of a CTA
constexpr int64_t kStaticSmem = 512;   // an upper bound of what the kernels have besides
constexpr int64_t kPairStaticSmem = 16;
constexpr int64_t kReservedSmem = 1024;     // of every CTA, by the system
constexpr int64_t kPairElements = 24576;    // of a block: below, kPair gains nothing or little
constexpr int64_t kManyElements = 1024;     // of a CTA: above, a cluster of 8 becomes 16
constexpr int64_t kMaxBlocks = 0x7F000000;  // and a grid more: dividends of FastDivisor

// Where every configuration begins.
HadamardConfig impossible(HadamardKernel kernel) {
  HadamardConfig config;
  config.kernel = kernel;
  config.grid = 0;
  return config;
}

// Blocks a CTA takes at a time: enough columns for all its threads and enough segments for all its
// warps, but no more shared memory than three CTAs an SM can have, and work for all SMs.
int64_t choose_group(int64_t block, int64_t segment, int64_t blocks, const HadamardSums& sums,
                     int64_t ctas_per_sm, const HadamardDevice& device) {
  const int64_t columns = sums.columns * kThreads, elements = segment < kLongSegment ? 6144 : 12288;
  const int64_t wanted =
      std::max((columns + segment - 1) / segment, (elements + block - 1) / block);
  const int64_t fits = std::max<int64_t>(1, 57344 / (4 * block));
  const int64_t shared_out = std::max<int64_t>(1, blocks / (2 * device.sm_count));
  const int64_t group = std::max<int64_t>(1, std::min({wanted, fits, shared_out}));
  // All in one wave rather than a few in a second.
  const int64_t wave = ctas_per_sm * device.sm_count, one_wave = (blocks + wave - 1) / wave;
  const bool little_more = one_wave <= group * 3 / 2 && one_wave * block * 4 <= 73728;
  return one_wave > group && little_more ? one_wave : group;
}

// CTAs that share a block: about one output of four columns a thread, work for all SMs.
int choose_cluster(const RowHadamardParams& p, const HadamardDevice& device) {
  const int64_t width = std::min(p.block_size / p.k, kTile);
  const int64_t blocks = p.rows * (p.cols / p.block_size);
  int cluster = 1;
  while (2 * cluster <= device.max_cluster && width / (2 * cluster) >= 8 &&
         p.block_size / cluster > (cluster < 8 ? 512 : kManyElements) &&
         blocks * 2 * cluster <= device.sm_count) {
    cluster *= 2;
  }
  return cluster;
}

// HadamardSums::few, which every k <= 60 that kSums can do has.
int few_thousands(int64_t k) {
  if (hadamard_sums_are_integers(k)) return k <= 112 ? 1300 : 320;
  return find_hadamard_sums(k)->few;
}

// Whether kCluster, which `config` is for, is faster than kSums or kMma: elements up to the
// measured number, in one wave of CTAs.
bool is_few(const RowHadamardParams& p, const HadamardConfig& config,
            const HadamardDevice& device) {
  const int64_t by_smem =
      (device.smem_limit + kReservedSmem) / (config.smem_bytes + kStaticSmem / 2 + kReservedSmem);
  const int64_t few = int64_t{1000} * few_thousands(p.k) * device.sm_count / 132;
  const int64_t by_threads = 1024 / config.threads;
  return p.rows * p.cols <= few && config.grid <= std::min(by_smem, by_threads) * device.sm_count;
}

// Whether kPair is faster than kSums, which holds one or two such blocks an SM: 16384 x 28672 in
// 1018 instead of 1080 us, 36864 in 1417 instead of 1545. Where kSums needs one wave, only for the
// longest (256 x 28672: 23.0 and 20.9 us, 256 x 53248: 42.4 and 47.2).
bool is_for_pairs(const RowHadamardParams& p, const HadamardDevice& device) {
  const int64_t blocks = p.rows * (p.cols / p.block_size);
  return p.block_size >= kPairElements &&
         (blocks > 2 * device.sm_count || p.block_size >= 2 * kPairElements);
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

bool hadamard_vectors(const RowHadamardParams& p) {
  const auto aligned = [](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0;
  };
  return p.cols % 8 == 0 && aligned(p.x, p.x_stride) && (!p.up || aligned(p.up, p.up_stride)) &&
         aligned(p.out, 0) && aligned(p.signs, 0) && p.cols < (1 << 30);
}

HadamardConfig hadamard_registers_config(const RowHadamardParams& p, bool vectors) {
  HadamardConfig config = impossible(HadamardKernel::kRegisters);
  if (vectors && p.dtype != RowDtype::kFloat32 && p.k == 1 && p.block_size <= kSegment &&
      p.scaling != RowScale::kDynamic) {
    const int64_t tiles = p.rows * ((p.cols + kSegment - 1) / kSegment);
    config.grid = (tiles + kThreads / 32 - 1) / (kThreads / 32);
  }
  return config;
}

HadamardConfig hadamard_sums_config(const RowHadamardParams& p, bool vectors,
                                    const HadamardDevice& device) {
  HadamardConfig config = impossible(HadamardKernel::kSums);
  const int64_t block = p.block_size, pow2 = block / p.k, segment = std::min(pow2, kSegment);
  const int64_t inputs = block / segment, blocks_per_row = p.cols / block;
  const int64_t blocks = p.rows * blocks_per_row;
  const HadamardSums* sums = find_hadamard_sums(p.k);
  const bool compiled = sums && (p.k > 1 ? inputs == p.k : inputs <= kMaxInputs);
  if (!vectors || p.dtype == RowDtype::kFloat32 || !compiled || segment < 8 ||
      blocks > kMaxBlocks) {
    return config;
  }
  const int64_t ctas_per_sm = segment < kLongSegment ? sums->short_ctas : sums->ctas_per_sm;
  const bool dynamic = p.scaling == RowScale::kDynamic;
  const int64_t group =
      dynamic ? blocks_per_row : choose_group(block, segment, blocks, *sums, ctas_per_sm, device);
  const int64_t smem = (group * block * 4 + 255) / 256 * 256;
  if (smem + kStaticSmem > device.smem_limit) return config;
  config.group = static_cast<int>(group);
  config.smem_bytes = smem;
  const int64_t by_smem =
      (device.smem_limit + kReservedSmem) / (smem + kStaticSmem / 2 + kReservedSmem);
  const int64_t ctas = std::max<int64_t>(1, std::min(by_smem, ctas_per_sm));
  const int64_t groups = (blocks + group - 1) / group;
  config.grid = std::min<int64_t>(groups, ctas * device.sm_count);
  if (ctas < 3 || groups <= 2 * device.sm_count) {
    config.threads = hadamard_sums_threads(ctas_per_sm);
  }
  return config;
}

HadamardConfig hadamard_pair_config(const RowHadamardParams& p, bool vectors,
                                    const HadamardDevice& device) {
  HadamardConfig config = impossible(HadamardKernel::kPair);
  const int64_t block = p.block_size, segment = block / p.k;
  const int64_t blocks = p.rows * (p.cols / block);
  const HadamardSums* sums = find_hadamard_sums(p.k);
  if (!vectors || p.dtype == RowDtype::kFloat32 || !sums || p.k == 1 || device.max_cluster < 2 ||
      (segment != 512 && segment != 1024) || p.scaling == RowScale::kDynamic ||
      blocks > kMaxBlocks) {
    return config;
  }
  config.cluster = 2;
  config.threads = kThreads;
  config.smem_bytes = block / 2 * 4;
  const int64_t smem = config.smem_bytes + kPairStaticSmem;
  if (smem > device.smem_limit) return config;
  const int64_t by_smem = (device.smem_limit + kReservedSmem) / (smem + kReservedSmem);
  const int64_t ctas = std::min<int64_t>(by_smem, sums->ctas_per_sm);
  config.grid = 2 * std::min(blocks, ctas * device.sm_count / 2);
  return config;
}

namespace {

// What kMma and kWgmma ask for, before their own limits.
bool can_multiply(const RowHadamardParams& p, bool vectors) {
  const bool whole_row = p.scaling != RowScale::kDynamic || p.cols == p.block_size;
  return vectors && p.dtype != RowDtype::kFloat32 && hadamard_sums_are_integers(p.k) &&
         p.k > 16 * (kMinHadamardMmaTiles - 1) && p.k <= 16 * kMaxHadamardMmaTiles && whole_row &&
         p.rows * (p.cols / p.block_size) <= kMaxBlocks;
}

// Rows beyond whole rounds of one CTA an SM: eight and fewer are faster on all SMs in a launch of
// kCluster (27648: about 3 us) than as another round of a few (9 us).
int64_t rows_beyond_rounds(const RowHadamardParams& p, int64_t grid, const HadamardDevice& device) {
  const int64_t rows = p.rows % grid;
  const bool one_round_more = grid == device.sm_count && p.rows > grid && p.cols == p.block_size;
  return one_round_more && rows <= 8 ? rows : 0;
}

// For clusters of config.cluster CTAs.
void take_smem(const RowHadamardParams& p, const HadamardDevice& device, int64_t smem,
               int64_t ctas_per_sm, HadamardConfig& config) {
  if (smem + kHadamardMmaStaticSmem > device.smem_limit) return;
  config.smem_bytes = smem;
  const int64_t by_smem =
      (device.smem_limit + kReservedSmem) / (smem + kHadamardMmaStaticSmem + kReservedSmem);
  const int64_t ctas = std::min<int64_t>(by_smem, ctas_per_sm) * device.sm_count;
  config.grid = config.cluster * std::min(p.rows * (p.cols / p.block_size), ctas / config.cluster);
}

// Whether kPairWgmma is faster than kMma and kWgmma: from HadamardPairBlock::many blocks on, and
// behind SwiGLU. Half the loads are left without it, and then what is sent takes longer than it
// saves (4096 x 13824: 113 us with kWgmma, 126 with pairs).
bool is_for_wgmma_pairs(const RowHadamardParams& p, const HadamardDevice& device) {
  const HadamardPairBlock* const block = find_hadamard_pair_block(p.k, p.block_size / p.k);
  return block && p.up &&
         p.rows * (p.cols / p.block_size) * 132 >= int64_t{block->many} * device.sm_count;
}

}  // namespace

HadamardConfig hadamard_mma_config(const RowHadamardParams& p, bool vectors,
                                   const HadamardDevice& device) {
  HadamardConfig config = impossible(HadamardKernel::kMma);
  if (!can_multiply(p, vectors)) return config;
  const int64_t tiles = (p.k + 15) / 16, steps = (tiles + 1) / 2;
  for (const HadamardMmaColumns& columns : kHadamardMmaColumns) {
    if (columns.pow2 != p.block_size / p.k) continue;
    config.threads = static_cast<int>(32 * tiles * columns.parts);
    const int64_t row_bytes = 4 * hadamard_mma_row_words(columns.pow2);
    take_smem(p, device, 3 * (p.k / 4) * row_bytes + 512 * tiles * steps,
              hadamard_mma_ctas_per_sm(config.threads, columns.tasks), config);
  }
  return config;
}

HadamardConfig hadamard_wgmma_config(const RowHadamardParams& p, bool vectors,
                                     const HadamardDevice& device) {
  HadamardConfig config = impossible(HadamardKernel::kWgmma);
  const int pow2 = static_cast<int>(p.block_size / p.k), steps = static_cast<int>((p.k + 31) / 32);
  if (!can_multiply(p, vectors) || device.arch != 90 || p.k > hadamard_wgmma_max_k(steps) ||
      !hadamard_wgmma_is_compiled(steps, pow2)) {
    return config;
  }
  const int64_t warps = (p.block_size / 32 + 31) / 32;  // of 32 elements a thread
  config.threads =
      32 * std::max<int>(static_cast<int>(warps), 4 * hadamard_wgmma_warpgroups(steps, pow2));
  const int64_t sign_bytes = 1024 * steps * steps * (pow2 / 64), plane_bytes = 32 * steps * pow2;
  const int64_t staged_bytes = hadamard_wgmma_stages_x(pow2) ? 2 * p.block_size : 0;
  take_smem(p, device, sign_bytes + 3 * plane_bytes + staged_bytes,
            hadamard_wgmma_ctas_per_sm(hadamard_wgmma_max_threads(steps, pow2)), config);
  if (config.grid > 0) config.last = rows_beyond_rounds(p, config.grid, device);
  return config;
}

HadamardConfig hadamard_pair_wgmma_config(const RowHadamardParams& p, bool vectors,
                                          const HadamardDevice& device) {
  HadamardConfig config = impossible(HadamardKernel::kPairWgmma);
  const HadamardPairBlock* const block = find_hadamard_pair_block(p.k, p.block_size / p.k);
  if (!block || !can_multiply(p, vectors) || device.arch != 90 ||
      device.max_cluster < block->ctas || p.scaling == RowScale::kDynamic) {
    return config;
  }
  const HadamardPairPlan plan = plan_hadamard_pair(*block);
  config.cluster = block->ctas;
  config.threads = 32 * plan.warps;
  take_smem(p, device, plan.smem, block->ctas_per_sm, config);
  return config;
}

HadamardClusterSmem plan_hadamard_cluster_smem(int64_t block_size, int64_t k, int cluster) {
  const int pow2 = static_cast<int>(block_size / k), width = std::min<int>(pow2, kTile);
  const int rows = pow2 / width, owned = width / cluster, groups = static_cast<int>(k) / 4;
  HadamardClusterSmem smem;
  smem.row_stride = owned;
  if (k == 1) {
    smem.row_stride += 4;  // lanes are rows: their 16 bytes in other banks
    smem.log2_group_rows = 31;
    smem.bytes = 4 * rows * smem.row_stride;
    return smem;
  }
  // A warp that takes columns of several groups finds them in other banks.
  smem.pad = owned < 32 ? owned : 0;
  for (smem.log2_group_rows = 2; 1 << smem.log2_group_rows < 4 * rows;) ++smem.log2_group_rows;
  if (hadamard_sums_are_integers(k)) {
    // The lanes of a fragment take four rows of a plane and eight columns. The product reads eight
    // rows a step, of the last plane beyond its end.
    smem.plane_row = owned == 8 ? owned : owned + 8;
    smem.planes_at = 4 * groups * (4 * rows * owned + smem.pad);
    smem.maxima_at =
        smem.planes_at + 4 * smem.plane_row * (2 * groups + 8 * hadamard_cluster_steps(k));
    smem.bytes = smem.maxima_at + 4 * 16 * cluster;
    return smem;
  }
  smem.table_at = 4 * groups * (4 * rows * owned + smem.pad);
  smem.picks_at = smem.table_at + 4 * groups * (8 * rows * owned + smem.pad);
  smem.picks_row = (groups + 3) / 4 * 4;
  smem.bytes = smem.picks_at + 2 * static_cast<int>(k) * smem.picks_row;
  return smem;
}

HadamardConfig hadamard_cluster_config(const RowHadamardParams& p, bool vectors,
                                       const HadamardDevice& device, int cluster) {
  HadamardConfig config = impossible(HadamardKernel::kCluster);
  config.cluster = cluster;
  const int64_t pow2 = p.block_size / p.k, width = std::min<int64_t>(pow2, kTile);
  const int64_t parts = pow2 / width, blocks = p.rows * (p.cols / p.block_size);
  const bool integers = hadamard_sums_are_integers(p.k);
  const bool shape = integers  ? parts == 1 && p.k <= 16 * kMaxHadamardMmaTiles
                     : p.k > 1 ? parts <= 4
                               : parts >= 2;
  const bool whole_row = p.scaling != RowScale::kDynamic || p.cols == p.block_size;
  if (!vectors || p.dtype == RowDtype::kFloat32 || !shape || !whole_row || width % 8 != 0 ||
      width < 8 * cluster || cluster > device.max_cluster || p.block_size > (1 << 20) ||
      blocks > 0x7FFFFFF0 / cluster) {
    return config;
  }
  const HadamardClusterSmem smem = plan_hadamard_cluster_smem(p.block_size, p.k, cluster);
  if (smem.bytes + kStaticSmem > device.smem_limit) return config;
  config.smem_bytes = smem.bytes;
  config.grid = blocks * cluster;
  // One round of outputs rather than two; but an SM has only one such CTA, and not every SM is free
  // for clusters.
  const int64_t outputs = p.block_size / cluster / 4;
  const bool more = !integers && outputs > 512 && 2 * config.grid <= device.sm_count;
  config.threads = more ? 1024 : 512;
  return config;
}

HadamardConfig choose_hadamard_config(const RowHadamardParams& p, bool vectors,
                                      const HadamardDevice& device) {
  HadamardConfig config = hadamard_registers_config(p, vectors);
  if (config.grid > 0) return config;
  config = hadamard_cluster_config(p, vectors, device, choose_cluster(p, device));
  HadamardConfig sums = hadamard_sums_config(p, vectors, device);
  const HadamardConfig pair = hadamard_pair_config(p, vectors, device);
  if (pair.grid > 0 && (sums.grid == 0 || is_for_pairs(p, device))) sums = pair;
  if (hadamard_sums_are_integers(p.k)) {
    // One wave of 64 columns: 256 x 11008 takes 14.0 us with kMma, 15.9 with kWgmma.
    const bool one_wave =
        p.block_size == 64 * p.k && p.rows * (p.cols / p.block_size) <= 2 * device.sm_count;
    sums = hadamard_wgmma_config(p, vectors, device);
    if (sums.grid == 0 || one_wave) sums = hadamard_mma_config(p, vectors, device);
    if (is_for_wgmma_pairs(p, device)) {
      const HadamardConfig pair_wgmma = hadamard_pair_wgmma_config(p, vectors, device);
      if (pair_wgmma.grid > 0) sums = pair_wgmma;
    }
  }
  if (config.grid > 0 && (sums.grid == 0 || is_few(p, config, device))) return config;
  if (sums.grid > 0) return sums;
  config = HadamardConfig();
  config.group = p.scaling == RowScale::kDynamic ? static_cast<int>(p.cols / p.block_size) : 1;
  const int64_t factors = hadamard_sums_are_integers(p.k) ? 1 : 0;
  config.smem_bytes = config.group * (p.block_size + factors) * 4;
  config.grid = (p.rows * (p.cols / p.block_size) + config.group - 1) / config.group;
  return config;
}

}  // namespace prefixquant
