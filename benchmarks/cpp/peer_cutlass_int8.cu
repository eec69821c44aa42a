// SPDX-License-Identifier: Apache-2.0
//
// CUTLASS's Hopper int8 GEMM (collective builder) on unpacked weights: the ceiling to reach.
#include <memory>
#include <stdexcept>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "peers.h"

namespace prefixquant::bench {
namespace {

using cute::Int;
using cute::Shape;

template <typename TileShape, typename ClusterShape, typename MainloopSchedule,
          typename EpilogueSchedule>
PeerLaunch make_cutlass_peer() {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void,
      cutlass::layout::RowMajor, 8, cutlass::half_t, cutlass::layout::RowMajor, 8,
      EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16,
      int8_t, cutlass::layout::ColumnMajor, 16, int32_t, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  auto gemm = std::make_shared<Gemm>();
  return [gemm](const void* x, const void* w, void* out, int m, int n, int k, cudaStream_t stream) {
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const int8_t*>(x), typename Kernel::StrideA{int64_t{k}, Int<1>{}, int64_t{0}},
         static_cast<const int8_t*>(w), typename Kernel::StrideB{int64_t{k}, Int<1>{}, int64_t{0}}},
        {{1e-3f, 0.0f},
         nullptr,
         typename Kernel::StrideC{int64_t{n}, Int<1>{}, int64_t{0}},
         static_cast<cutlass::half_t*>(out),
         typename Kernel::StrideD{int64_t{n}, Int<1>{}, int64_t{0}}}};
    if (Gemm::get_workspace_size(arguments) != 0)
      throw std::runtime_error("CUTLASS peer: unexpected workspace");
    if (gemm->initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
        gemm->run(stream) != cutlass::Status::kSuccess)
      throw std::runtime_error("CUTLASS peer: launch failed");
  };
}

}  // namespace

PeerLaunch make_cutlass_int8_128x256() {
  return make_cutlass_peer<Shape<Int<128>, Int<256>, Int<128>>, Shape<Int<2>, Int<1>, Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                           cutlass::epilogue::TmaWarpSpecializedCooperative>();
}

PeerLaunch make_cutlass_int8_128x128() {
  return make_cutlass_peer<Shape<Int<128>, Int<128>, Int<128>>, Shape<Int<1>, Int<1>, Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                           cutlass::epilogue::TmaWarpSpecialized>();
}

}  // namespace prefixquant::bench
