// SPDX-License-Identifier: Apache-2.0
//
// Hadamard transforms of rows on the GPU, alone or fused with SwiGLU and quantization: host
// interface.
//
// Computes, for each block of block_size = pow2 * k elements of a row:
//   v = x, or silu(gate) * up                                          float32
//   y = (H_k (x) H_pow2) v / sqrt(pow2 k)                              float32
//   out = y rounded to x's dtype, or clamp(rint(y * (1 / scale)), qmin, qmax) as int8
// The order of the additions, and the integers that are added for 60 < k < 512, are those of
// cpp/kernels/hadamard.h, so that transform and levels are
// the CPU's bit for bit; silu is within 4 ulp of float32 (ex2 and rcp of the special function
// unit), so that a level after SwiGLU may differ by one where y / scale lies within 1e-5 of a tie.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "prefixquant/row_dtype.h"

namespace prefixquant {

// Arguments of one launch. Device pointers; strides in elements.
struct RowHadamardParams {
  const void* x = nullptr;   // [rows, cols], rows contiguous; the gate where `up` is there
  const void* up = nullptr;  // [rows, cols], may be nullptr
  RowDtype dtype = RowDtype::kFloat16;   // of x and up
  int64_t x_stride = 0;                  // between rows
  int64_t up_stride = 0;                 //
  void* out = nullptr;                   // [rows, cols] contiguous
  RowScale scaling = RowScale::kStatic;  // kNone: `out` has x's dtype, otherwise it is int8
  const float* scale = nullptr;          // [] for kStatic
  float* row_scale = nullptr;            // [rows] for kDynamic: max|y| / qmax, 1 where that is 0
  float qmin = -8.0f;                    //
  float qmax = 7.0f;                     //
  const int8_t* signs = nullptr;         // [k, k] of 1 and -1, nullptr for k = 1
  int64_t block_size = 1;                // pow2 * k; 1: no transform
  int64_t k = 1;                         // 1, or a multiple of 4
  int64_t rows = 0;                      //
  int64_t cols = 0;                      // a multiple of block_size
};

// What a device can do, as far as launches depend on it.
struct HadamardDevice {
  int arch = 90;            // 10 * major + minor
  int sm_count = 132;       //
  int smem_limit = 232448;  // bytes of shared memory a block can have
  int max_cluster = 16;     // CTAs a cluster can have; 1 before sm_90
};
// The current one.
HadamardDevice current_hadamard_device();

// Whether the k part adds integers (cpp/kernels/hadamard.h) and not float32.
constexpr bool hadamard_sums_are_integers(int64_t k) { return k > 60 && k < 512; }

enum class HadamardKernel : int {
  kRegisters,  // k = 1, pow2 <= 1024: a warp transforms whole blocks in registers
  kSums,       // any compiled k, or k = 1 and pow2 > 1024: blocks meet in shared memory once
  kPair,       // kSums for longer blocks on sm_90: two CTAs share a block
  kMma,        // 64 < k <= 192, pow2 of 64 to 256: integers on the tensor cores
  kWgmma,      // the same for sm_90: k up to 80 and above 96, pow2 of 64, 128, some of 256
  kPairWgmma,  // kWgmma for longer blocks: CTAs share a block
  kCluster,    // any k: CTAs share a block, signs are data; few rows, and other sign matrices
  kGeneric     // any k, size, dtype and alignment
};

// A launch configuration: plain data, chosen by a pure function.
struct HadamardConfig {
  HadamardKernel kernel = HadamardKernel::kGeneric;
  int cluster = 1;   // CTAs that share one block
  int group = 1;     // blocks of a CTA at a time
  int64_t grid = 1;  // CTAs; 0: the kernel cannot do this
  int64_t smem_bytes = 0;
  int threads = 256;  // of a CTA; not kRegisters and kGeneric
  int64_t last = 0;   // rows at the end that are another launch, with a configuration of their own
};

// Where kCluster has what in a CTA's shared memory.
struct HadamardClusterSmem {
  int row_stride = 0;       // floats between the rows of x
  int log2_group_rows = 0;  // rows of four inputs j
  int pad = 0;              // floats after them, in x and in the table
  int planes_at = 0;        // bytes; sums of integers: the planes and the maxima of the warps
  int plane_row = 0;        // words of four inputs j in a plane
  int maxima_at = 0;        // bytes
  int table_at = 0;         // bytes; sums of float32: the table and the picks
  int picks_at = 0;         // bytes
  int picks_row = 0;        // picks of an output, a multiple of 4
  int bytes = 0;
};
HadamardClusterSmem plan_hadamard_cluster_smem(int64_t block_size, int64_t k, int cluster);

// The sizes k whose float32 sums are compiled with constant signs.
struct HadamardSums {
  int k;            // 1: butterflies of pow2 / 1024
  int columns;      // neighbours that a thread takes together
  int ctas_per_sm;  // that the registers are bounded for
  int short_ctas;   // the same where 2^m < 512
  int few;          // thousands of elements up to which kCluster is faster on 132 SMs
};
inline constexpr HadamardSums kHadamardSums[] = {
    {1, 2, 2, 2, 250},   {12, 2, 3, 4, 600},  {20, 2, 3, 3, 1000},
    {28, 2, 3, 3, 2600}, {36, 1, 3, 3, 1500}, {40, 1, 3, 3, 1500},
    {44, 1, 3, 3, 1500}, {52, 1, 2, 2, 1500}, {60, 1, 2, 2, 1500},
};
// The most threads a CTA of kSums can have: three CTAs of 256 are two of 384.
constexpr int hadamard_sums_threads(int ctas_per_sm) { return ctas_per_sm == 3 ? 384 : 256; }

// An upper bound of what a CTA of kMma, kWgmma and kPairWgmma has in static shared memory.
inline constexpr int kHadamardMmaStaticSmem = 1024;

// The shapes of kMma: 16 outputs a tile.
inline constexpr int kMinHadamardMmaTiles = 5;
inline constexpr int kMaxHadamardMmaTiles = 12;
struct HadamardMmaColumns {
  int pow2;   // 64 parts tasks
  int parts;  // warps that share a tile's columns
  int tasks;  // 4 rows j x 8 columns of a thread
};
inline constexpr HadamardMmaColumns kHadamardMmaColumns[] = {{64, 1, 1}, {128, 1, 2}, {256, 2, 2}};
// Words of a plane that four rows j have.
constexpr int hadamard_mma_row_words(int pow2) { return pow2 + 8; }
// That the registers are bounded for: 80 a thread, 96 with two tasks, are enough.
constexpr int hadamard_mma_ctas_per_sm(int threads, int tasks) {
  const int ctas = 65536 / (threads * (tasks == 1 ? 80 : 96));
  return ctas > 0 ? ctas : 1;
}

// The shapes of kWgmma: 32 inputs a step, 4 rows j x 8 columns a thread.
inline constexpr int kMinHadamardWgmmaSteps = 3;
inline constexpr int kMaxHadamardWgmmaSteps = 6;
// Three steps are for 76 and its neighbours: a sixth warp would cost one of six CTAs.
constexpr int hadamard_wgmma_max_k(int steps) { return steps == 3 ? 80 : 32 * steps; }
constexpr bool hadamard_wgmma_is_compiled(int steps, int pow2) {
  return pow2 == 64 || pow2 == 128 || (pow2 == 256 && steps == 4);
}
constexpr int hadamard_wgmma_max_threads(int steps, int pow2) {
  return hadamard_wgmma_max_k(steps) * pow2 / 32;
}
// Warpgroups that multiply; a CTA may have warps beyond them. 640 threads: twelve products.
constexpr int hadamard_wgmma_warpgroups(int steps, int pow2) {
  const int threads = hadamard_wgmma_max_threads(steps, pow2);
  return threads == 640 ? 4 : threads / 128;
}
// That the registers are bounded for: 64 to 80 a thread, and 48 where 640 threads are two CTAs.
constexpr int hadamard_wgmma_ctas_per_sm(int max_threads) {
  return max_threads == 640 ? 2 : 1024 / max_threads;
}

// Whether the x of the next block is copied to shared memory while the products of one are made:
// where an SM holds one CTA, nothing else overlaps its loads.
constexpr bool hadamard_wgmma_stages_x(int pow2) { return pow2 == 256; }

// The blocks of kPairWgmma.
struct HadamardPairBlock {
  int k, pow2;
  int ctas;         // that share a block
  int groups;       // of four inputs that a CTA but the last transforms
  int ctas_per_sm;  // that the registers are bounded for, as shared memory allows
  int many;         // blocks on 132 SMs from which, behind SwiGLU, it beats kMma and kWgmma
};
inline constexpr HadamardPairBlock kHadamardPairBlocks[] = {
    {68, 256, 2, 9, 3, 132}, {108, 128, 2, 14, 4, 264}, {148, 128, 2, 19, 3, 132}};
inline constexpr int kHadamardPairBlockCount =
    sizeof(kHadamardPairBlocks) / sizeof(kHadamardPairBlocks[0]);

// The one of k x pow2, or nullptr.
constexpr const HadamardPairBlock* find_hadamard_pair_block(int64_t k, int64_t pow2) {
  for (const HadamardPairBlock& block : kHadamardPairBlocks) {
    if (block.k == k && block.pow2 == pow2) return &block;
  }
  return nullptr;
}

// How the CTAs share such a block.
struct HadamardPairPlan {
  int last_groups;        // that the last CTA transforms
  int cores, last_cores;  // of 16 inputs, that those of a CTA take in the planes
  int all_cores;
  int sent_cores;   // behind them, what a CTA sends
  int steps;        // of 32 inputs
  int tiles;        // of 64 outputs, by wgmma
  int rest;         // outputs beyond them, by mma.sync
  int chunks;       // of 8 columns, that a CTA multiplies
  int warpgroups;   // that multiply a tile with 64 columns
  int warps;        // of a CTA: a task a thread; those beyond the warpgroups have the rest
  int rows;         // outputs of the signs: a tile may reach beyond, into what is no output
  int sign_copies;  // one for each 64 columns
  int copy_bytes;
  int plane_bytes;  // with what is sent of it
  int smem;
};
constexpr HadamardPairPlan plan_hadamard_pair(const HadamardPairBlock& block) {
  HadamardPairPlan plan = {};
  plan.last_groups = block.k / 4 - (block.ctas - 1) * block.groups;
  plan.cores = (block.groups + 3) / 4;
  plan.last_cores = (plan.last_groups + 3) / 4;
  plan.all_cores = (block.ctas - 1) * plan.cores + plan.last_cores;
  const int most_cores = plan.cores > plan.last_cores ? plan.cores : plan.last_cores;
  plan.sent_cores = (block.ctas - 1) * most_cores;
  plan.steps = (plan.all_cores + 1) / 2;
  plan.tiles = (block.k + 31) / 64;  // half a tile and more is a tile
  plan.rest = block.k > 64 * plan.tiles ? block.k - 64 * plan.tiles : 0;
  plan.chunks = block.pow2 / 8 / block.ctas;
  plan.warpgroups = plan.tiles * plan.chunks / 8;
  const int most_groups = block.groups > plan.last_groups ? block.groups : plan.last_groups;
  const int task_warps = (most_groups * block.pow2 / 8 + 31) / 32;
  const int multiplying = 4 * plan.warpgroups + (plan.rest > 0 ? 1 : 0);
  plan.warps = task_warps > multiplying ? task_warps : multiplying;
  plan.rows = (block.k + 7) / 8 * 8;
  plan.sign_copies = plan.chunks / 8;
  plan.copy_bytes = 2 * plan.steps * plan.rows * 16;
  plan.plane_bytes = (plan.all_cores + plan.sent_cores) * plan.chunks * 128;
  plan.smem = plan.sign_copies * plan.copy_bytes + 3 * plan.plane_bytes;
  return plan;
}

// The inputs of the kernels of kCluster for sums of integers, in steps of 32.
constexpr int hadamard_cluster_steps(int64_t k) {
  return k <= 96 ? 3 : static_cast<int>((k + 31) / 32);
}

// nullptr where none is compiled.
const HadamardSums* find_hadamard_sums(int64_t k);
// Writes the sign matrix [k, k] that the kernels of k were compiled with; false where there are
// none.
bool compiled_hadamard_signs(int64_t k, int8_t* signs);

// The configuration of one kernel, grid 0 where it cannot. `vectors` as below.
HadamardConfig hadamard_registers_config(const RowHadamardParams& params, bool vectors);
HadamardConfig hadamard_sums_config(const RowHadamardParams& params, bool vectors,
                                    const HadamardDevice& device);
HadamardConfig hadamard_pair_config(const RowHadamardParams& params, bool vectors,
                                    const HadamardDevice& device);
HadamardConfig hadamard_mma_config(const RowHadamardParams& params, bool vectors,
                                   const HadamardDevice& device);
HadamardConfig hadamard_wgmma_config(const RowHadamardParams& params, bool vectors,
                                     const HadamardDevice& device);
HadamardConfig hadamard_pair_wgmma_config(const RowHadamardParams& params, bool vectors,
                                          const HadamardDevice& device);
HadamardConfig hadamard_cluster_config(const RowHadamardParams& params, bool vectors,
                                       const HadamardDevice& device, int cluster);

// The best of them. `vectors`: rows start at multiples of 16 bytes and 8 divides cols.
HadamardConfig choose_hadamard_config(const RowHadamardParams& params, bool vectors,
                                      const HadamardDevice& device);

// Whether the pointers and strides allow vectors of 16 bytes.
bool hadamard_vectors(const RowHadamardParams& params);

// Asynchronous on `stream`, no allocation, no synchronisation. On sm_90 and later the launch
// overlaps the end of the kernel before it: the signs must not be written by that kernel. Throws
// std::invalid_argument for impossible arguments (a block larger than the device's shared memory
// among them) and std::runtime_error for CUDA errors.
void launch_hadamard(const RowHadamardParams& params, cudaStream_t stream);
// With one of the configurations above; for measuring them against each other.
void launch_hadamard(const RowHadamardParams& params, const HadamardConfig& config,
                     cudaStream_t stream);

}  // namespace prefixquant
