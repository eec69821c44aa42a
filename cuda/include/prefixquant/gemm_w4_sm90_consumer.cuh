// SPDX-License-Identifier: Apache-2.0
//
// Consumer warpgroup of the Hopper GEMM (gemm_w4_sm90.cuh): fragments and wgmma, reduction of the
// parts of K, epilogue stores.
#pragma once

#include <cstdint>

#include "prefixquant/cp_async.cuh"
#include "prefixquant/epilogue.cuh"
#include "prefixquant/gemm_w4_sm90_schedule.cuh"
#include "prefixquant/int4.cuh"
#include "prefixquant/mbarrier.cuh"
#include "prefixquant/wgmma.cuh"

namespace prefixquant {

// A fragments of one group of 64 rows for the four k32 steps of a stage, unpacked from smem.
template <int kWeightBits>
__device__ __forceinline__ void load_w_fragments(uint32_t w_smem, int thread, uint32_t (&a)[16]) {
  if constexpr (kWeightBits == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = load_shared_16(w_smem + half * kFragmentBlockBytes + thread * 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[half * 8 + j] = unpack_low_nibbles_16x(words[j]);
        a[half * 8 + 4 + j] = unpack_high_nibbles_16x(words[j]);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 v = load_shared_16(w_smem + step * kFragmentBlockBytes + thread * 16);
      a[step * 4] = v.x, a[step * 4 + 1] = v.y, a[step * 4 + 2] = v.z, a[step * 4 + 3] = v.w;
    }
  }
}

// One consumer warpgroup: its threads' view of the tile, and the stages of its work.
template <typename Traits>
struct GemmW4Sm90Consumer {
  static constexpr int kM64 = Traits::kM64;
  static constexpr int kAccumulators = Traits::kAccumulators;

  const GemmW4Sm90Args& args;
  const GemmW4Sm90Smem<Traits>& smem;
  int consumer;  // 0 or 1
  int thread;    // 0 .. 127
  GemmW4CtaPosition cta;

  int32_t acc[kM64][kAccumulators];
  float scale[kM64][2];
  float bias[kM64][2];
  uint32_t a[2][kM64]
            [16];  // fragments in use by wgmma, and those being unpacked for the next stage

  __device__ __forceinline__ GemmW4Sm90Consumer(const GemmW4Sm90Args& args_,
                                                const GemmW4Sm90Smem<Traits>& smem_, int consumer_,
                                                int thread_, const GemmW4CtaPosition& cta_)
      : args(args_), smem(smem_), consumer(consumer_), thread(thread_), cta(cta_) {}

  template <int kBuffer>
  __device__ __forceinline__ void fetch_fragments(int stage) {
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
      load_w_fragments<Traits::kWeightBits>(
          smem.w(stage) + (consumer * kM64 + mb) * Traits::kW64Bytes, thread, a[kBuffer][mb]);
  }

  // Tells every producer that writes to this stage that this thread has finished with it. At home
  // every lane speaks for its own reads: that costs nothing (H100, M = 17 .. 4096), and it is the
  // form that compute-sanitizer's racecheck follows. At the other CTAs of a cluster one lane speaks
  // for the warp, because each arrival there is a message: wgmma_wait has just converged the warp,
  // and every lane's fragments have been used.
  __device__ __forceinline__ void release(int stage) {
    mbarrier_arrive(smem.empty(stage));
    if constexpr (Traits::kCluster > 1) {
      const int rank = thread % 32;
      if (rank < Traits::kCluster && rank != cta.rank) {
        mbarrier_arrive_cluster(smem.empty(stage), rank);
      }
    }
  }

  template <int kBuffer>
  __device__ __forceinline__ void multiply(int stage, bool first) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t x = wgmma_descriptor_128b(smem.x(stage)) + step * 2;
#pragma unroll
      for (int mb = 0; mb < kM64; ++mb)
        WgmmaS8<Traits::BLOCK_TOKENS>::mma(acc[mb], &a[kBuffer][mb][step * 4], x,
                                           step > 0 || !first);
    }
    wgmma_commit();
  }

  // One stage: start its wgmmas, and while they run retire the stage before and unpack the next.
  template <int kBuffer>
  __device__ __forceinline__ void iterate(PipelineCursor<Traits::kStages>& cursor, int& running,
                                          bool last) {
    multiply<kBuffer>(cursor.stage, running < 0);
    wgmma_wait<1>();
    if (running >= 0) release(running);
    running = cursor.stage;
    cursor.advance();
    if (!last) {
      mbarrier_wait(smem.full(cursor.stage), cursor.parity);
      fetch_fragments<1 - kBuffer>(cursor.stage);
    }
  }

  __device__ __forceinline__ void multiply_segment(const GemmW4Segment& segment,
                                                   PipelineCursor<Traits::kStages>& cursor) {
    const int iterations = segment.k_end - segment.k_begin;
    int running = -1;  // the stage whose wgmmas are in flight
    mbarrier_wait(smem.full(cursor.stage), cursor.parity);
    fetch_fragments<0>(cursor.stage);
    int i = 0;
    for (; i + 2 <= iterations; i += 2) {
      iterate<0>(cursor, running, false);
      iterate<1>(cursor, running, i + 2 == iterations);
    }
    if (i < iterations) iterate<0>(cursor, running, true);
    wgmma_wait<0>();
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb) wgmma_pin(acc[mb]);
    release(running);
  }

  __device__ __forceinline__ void sync() const { named_barrier_sync(1 + consumer, 128); }

  // Workspace slot of a cluster's first (0) or last (1) stream-K segment.
  __device__ __forceinline__ int4* partial_slot(int cluster, int which) const {
    constexpr int kSlotVectors = kM64 * kAccumulators / 4 * 128;
    const int64_t slot =
        ((int64_t{cluster} * 2 + which) * Traits::kCluster + cta.rank) * Traits::kConsumers +
        consumer;
    return args.partials + slot * kSlotVectors + thread;
  }

  // Thread 0's value for all threads of the warpgroup.
  __device__ __forceinline__ int broadcast(int value, int phase) const {
    const uint32_t address = smem.mailbox(consumer, phase);
    if (thread == 0) asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
    sync();
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
  }

  // Meets the other clusters that share this tile. True for the last one to arrive, which then
  // holds the whole sum.
  __device__ bool reduce_partials(const GemmW4Segment& segment) {
    const int cluster = cta.cluster, clusters = cta.clusters;
    const int tile_begin = segment.stream_k_tile * args.k_iterations;
    const int mine = segment.k_end - segment.k_begin;
    if (mine == args.k_iterations) return true;
    int* counter = args.counters +
                   (segment.stream_k_tile * Traits::kCluster + cta.rank) * Traits::kConsumers +
                   consumer;
    // If all others have been here, there is nobody to leave our part for.
    int arrived = thread == 0 ? *reinterpret_cast<volatile int*>(counter) : 0;
    arrived = broadcast(arrived, 0);
    if (arrived + mine < args.k_iterations) {
      // A cluster's range starts inside this tile exactly if this is its first segment.
      const int begin = GemmW4Schedule::stream_k_begin(args, cluster, clusters);
      int4* slot = partial_slot(cluster, begin >= tile_begin ? 0 : 1);
#pragma unroll
      for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
        for (int i = 0; i < kAccumulators / 4; ++i)
          __stcg(slot + (mb * (kAccumulators / 4) + i) * 128,
                 make_int4(acc[mb][4 * i], acc[mb][4 * i + 1], acc[mb][4 * i + 2],
                           acc[mb][4 * i + 3]));
      __threadfence();
      sync();
      if (thread == 0) arrived = atomicAdd(counter, mine);
      arrived = broadcast(arrived, 1);
      if (arrived + mine < args.k_iterations) return false;
    }
    __threadfence();
    if (thread == 0) *counter = 0;
    // The clusters whose ranges meet [tile_begin, tile_begin + k_iterations) are consecutive.
    for (int direction = -1; direction <= 1; direction += 2) {
      for (int other = cluster + direction; other >= 0 && other < clusters; other += direction) {
        const int begin = GemmW4Schedule::stream_k_begin(args, other, clusters);
        const int end = GemmW4Schedule::stream_k_begin(args, other + 1, clusters);
        if (end <= tile_begin || begin >= tile_begin + args.k_iterations) break;
        if (begin == end) continue;  // more clusters than iterations
        const int4* slot = partial_slot(other, begin >= tile_begin ? 0 : 1);
#pragma unroll
        for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
          for (int i = 0; i < kAccumulators / 4; ++i) {
            const int4 part = __ldcg(slot + (mb * (kAccumulators / 4) + i) * 128);
            acc[mb][4 * i] += part.x, acc[mb][4 * i + 1] += part.y;
            acc[mb][4 * i + 2] += part.z, acc[mb][4 * i + 3] += part.w;
          }
      }
    }
    return true;
  }

  // Sums the parts of K of the cluster's CTAs: every CTA lays its accumulators out in the memory of
  // its stages (all of them consumed), and adds up its share of the tokens over all CTAs into the
  // first registers of acc. Every thread of the cluster takes part in the two cluster barriers, the
  // second one is at the end of the kernel.
  __device__ __forceinline__ void reduce_split() {
    constexpr int kVectors = kAccumulators / 4;  // a vector = 8 tokens of this thread's fragment
    constexpr int kShare = kVectors / Traits::kSplitK;
    const auto vector_address = [&](int mb, int vector) {
      const int index = (consumer * kM64 + mb) * kVectors + vector;
      return smem.base + (index * 128 + thread) * 16;
    };
    named_barrier_sync(3, 128 * Traits::kConsumers);  // nobody reads the stages any more
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(vector_address(mb, i)),
                     "r"(acc[mb][4 * i]), "r"(acc[mb][4 * i + 1]), "r"(acc[mb][4 * i + 2]),
                     "r"(acc[mb][4 * i + 3])
                     : "memory");
    cluster_sync();
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        int32_t sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int part = 0; part < Traits::kSplitK; ++part) {
          int32_t v[4];
          asm volatile(
              "{\n"
              ".reg .b32 remote;\n"
              "mapa.shared::cluster.u32 remote, %4, %5;\n"
              "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote];\n"
              "}"
              : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
              : "r"(vector_address(mb, cta.k_part * kShare + i)), "r"(part)
              : "memory");
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[c] += v[c];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[mb][4 * i + c] = sum[c];
      }
  }

  // Channel scales and biases of this thread's two rows of each group of 64. They are read before
  // the main loop, which hides the latency; volatile, so that the loads are not sunk to their use.
  __device__ __forceinline__ void load_row_constants(const GemmW4Segment& segment) {
    const EpilogueArgs& e = args.epilogue;
    constexpr float kUnpackFactor = Traits::kWeightBits == 4 ? 1.0f / kUnpackedW4Factor : 1.0f;
    const float input_scale = load_constant_float(e.input_scale);
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_channel(segment, mb) + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
        const int channel = min(row, e.n - 1);
        scale[mb][h] =
            __fmul_rn(input_scale, load_constant_float(e.weight_scale + channel)) * kUnpackFactor;
        bias[mb][h] = e.bias != nullptr ? load_as_float(e.bias, e.bias_dtype, channel) : 0.0f;
      }
  }
  __device__ __forceinline__ int first_channel(const GemmW4Segment& segment, int mb) const {
    return (segment.row_tile * Traits::kCluster + cta.rank) * Traits::BLOCK_ROWS +
           (consumer * kM64 + mb) * 64;
  }
  // y + 0 would turn -0 into +0, so a missing bias is skipped, not added.
  __device__ __forceinline__ float dequantize(int32_t value, int mb, int h) const {
    const float y = __fmul_rn(__int2float_rn(value), scale[mb][h]);
    return args.epilogue.bias != nullptr ? __fadd_rn(y, bias[mb][h]) : y;
  }

  // 16-bit output: transpose through shared memory, 64 channels x kStagingTokens at a time.
  template <bool kIsBf16>
  __device__ __forceinline__ void store_16bit(int first_channel, int first_token, int mb) {
    const EpilogueArgs& e = args.epilogue;
    const int lane = thread % 32, warp = thread / 32;
    const uint32_t staging = smem.staging(consumer);
    const bool plain_vectors = e.vectors && !e.swiglu && e.residual == nullptr &&
                               e.output_scale == nullptr && first_channel + 64 <= e.n;
#pragma unroll
    for (int part = 0; part < Traits::kFinalTokens / Traits::kStagingTokens; ++part) {
      const int part_token = first_token + part * Traits::kStagingTokens;
      if (part_token >= e.m) break;
      if (part > 0 || mb > 0) sync();  // the part before has been read
#pragma unroll
      for (int i = 0; i < Traits::kStagingTokens / 16; ++i) {
        // Four 8x8 matrices: channels 0-7 and 8-15 of the warp, tokens 0-7, then tokens 8-15.
        const int32_t* d = &acc[mb][part * Traits::kStagingTokens / 2 + i * 8];
        const uint32_t r0 = pack_16bit<kIsBf16>(dequantize(d[0], mb, 0), dequantize(d[1], mb, 0));
        const uint32_t r1 = pack_16bit<kIsBf16>(dequantize(d[2], mb, 1), dequantize(d[3], mb, 1));
        const uint32_t r2 = pack_16bit<kIsBf16>(dequantize(d[4], mb, 0), dequantize(d[5], mb, 0));
        const uint32_t r3 = pack_16bit<kIsBf16>(dequantize(d[6], mb, 1), dequantize(d[7], mb, 1));
        // Row of the stored matrix = token; 16-byte chunks are swizzled by it against conflicts.
        const int token = i * 16 + lane / 16 * 8 + lane % 8;
        const int chunk = warp * 2 + lane / 8 % 2;
        const uint32_t address = staging + token * 128 + ((chunk ^ (token & 7)) << 4);
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
            "r"(r0), "r"(r1), "r"(r2), "r"(r3)
            : "memory");
      }
      sync();
      const int chunk = thread % 8;
      const int channel = first_channel + chunk * 8;
      const int tokens = channel < e.n ? min(Traits::kStagingTokens, e.m - part_token) : 0;
      const auto staged = [&](int token) {
        return load_shared_16(staging + token * 128 + ((chunk ^ (token & 7)) << 4));
      };
      if (plain_vectors) {
        uint16_t* out = static_cast<uint16_t*>(e.out) + part_token * e.out_row_stride + channel;
#pragma unroll
        for (int i = 0; i < Traits::kStagingTokens / 16; ++i) {
          const int token = i * 16 + thread / 8;
          if (token < tokens)
            *reinterpret_cast<uint4*>(out + token * e.out_row_stride) = staged(token);
        }
      } else {
#pragma unroll 1
        for (int token = thread / 8; token < tokens; token += 16)
          finish_and_store_8(e, staged(token), channel, part_token + token);
      }
    }
  }

  // 32-bit output straight from registers: eight lanes cover one 32-byte sector of a token's row.
  __device__ __forceinline__ void store_32bit(int first_channel, int first_token, int mb) const {
    const EpilogueArgs& e = args.epilogue;
    const int lane = thread % 32, warp = thread / 32;
    constexpr int kShift = Traits::kWeightBits == 4 ? 4 : 0;  // acc holds 16x the sum
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = first_channel + warp * 16 + lane / 4 + 8 * h;
      if (channel >= e.n) continue;
#pragma unroll
      for (int i = 0; i < Traits::kFinalTokens / 4; ++i) {
        const int token = first_token + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (token >= e.m) break;
        const int32_t value = acc[mb][i / 2 * 4 + 2 * h + i % 2];
        static_cast<uint32_t*>(e.out)[token * e.out_row_stride + channel] =
            e.out_dtype == GemmDtype::kInt32 ? static_cast<uint32_t>(value >> kShift)
                                             : __float_as_uint(dequantize(value, mb, h));
      }
    }
  }

  __device__ __forceinline__ void store(const GemmW4Segment& segment) {
    const int first_token =
        segment.token_tile * Traits::BLOCK_TOKENS + cta.k_part * Traits::kFinalTokens;
    sync();  // the staging buffer is free: every warp has read the tile before
#pragma unroll
    for (int mb = 0; mb < kM64; ++mb) {
      const int channel = first_channel(segment, mb);
      if (channel >= args.epilogue.n) break;
      switch (args.epilogue.out_dtype) {
        case GemmDtype::kFloat16:
          store_16bit<false>(channel, first_token, mb);
          break;
        case GemmDtype::kBFloat16:
          store_16bit<true>(channel, first_token, mb);
          break;
        case GemmDtype::kFloat32:
        case GemmDtype::kInt32:
          store_32bit(channel, first_token, mb);
          break;
      }
    }
  }
};

}  // namespace prefixquant
