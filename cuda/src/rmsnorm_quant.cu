// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/rmsnorm_quant.cuh"

#include <algorithm>
#include <cmath>

#include "prefixquant/launch.h"
#include "prefixquant/rmsnorm_quant_lane.cuh"

namespace prefixquant {
namespace {

constexpr int kWarpRowVectors = 4;  // a warp holds rows of up to 1024 elements
constexpr int kWarpRowsPerCta = 4;
constexpr int kWaveCtas = 8;  // of one warp a row, that an SM takes of one wave

// Shared memory beside a kernel's own with which `ctas` of it fit an SM.
template <typename Kernel>
size_t smem_for_ctas(Kernel kernel, int ctas, const CurrentDevice& device) {
  constexpr int kReserved = 1024;  // by the system, for each CTA
  cudaFuncAttributes attributes = {};
  PQ_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return (device.smem_limit + kReserved) / ctas - kReserved - attributes.sharedSizeBytes;
}

bool aligned(const void* pointer, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * element_bytes % 16 == 0;
}

bool fits_vectors(const RowQuantParams& p) {
  const int64_t bytes = p.dtype == RowDtype::kFloat32 ? 4 : 2;
  // Beyond, a row does not fit the registers of 1024 threads.
  const int64_t widest = p.dtype == RowDtype::kFloat32 ? 16384 : 32768;
  return p.cols % 8 == 0 && p.cols <= widest && aligned(p.x, p.x_stride, bytes) &&
         (!p.residual || aligned(p.residual, p.residual_stride, bytes)) &&
         aligned(p.weight, 0, 1) && aligned(p.shift, 0, 1) && aligned(p.out, 0, 1);
}

constexpr int kLaneCols = 576;  // of row_quant_lane_kernel<T, 2, 2, ...>

bool channels_like_x(const RowQuantParams& p) {
  return (!p.weight || p.weight_dtype == p.dtype) && (!p.shift || p.shift_dtype == p.dtype);
}

RowQuantSchedule schedule_of(const RowQuantParams& p) {
  int exponent = 0;
  const bool power =
      std::frexp(-p.qmin, &exponent) == 0.5f && exponent <= 8 && p.qmax == -p.qmin - 1.0f;
  return {1.0 / static_cast<double>(p.cols), true, power ? -1.0f / p.qmin : 0.0f};
}

template <typename T, bool kNormalize, RowScale kScaling>
void launch_vectors(const RowQuantParams& p, const CurrentDevice& device, cudaStream_t stream) {
  const int vectors = static_cast<int>(p.cols / 8);
  RowQuantSchedule schedule = schedule_of(p);
  LaunchShape shape;
  if (vectors <= 32 * kWarpRowVectors) {
    shape.grid = (p.rows + kWarpRowsPerCta - 1) / kWarpRowsPerCta;
    shape.block = 32 * kWarpRowsPerCta;
    auto kernel = vectors <= 64 ? row_quant_kernel<T, 2, kNormalize, kScaling, true, 128>
                  : vectors <= 96
                      ? row_quant_kernel<T, 3, kNormalize, kScaling, true, 128>
                      : row_quant_kernel<T, kWarpRowVectors, kNormalize, kScaling, true, 128>;
    if constexpr (sizeof(T) == 2) {
      if (p.cols == kLaneCols && channels_like_x(p)) {
        kernel = row_quant_lane_kernel<T, 2, 2, kNormalize, kScaling>;
      }
    }
    const int64_t wave = int64_t{kWaveCtas} * device.sm_count;
    schedule.launch_early = shape.grid > wave;
    // Where one wave fills the SMs, CTAs of the next such kernel would take places beside its own,
    // on some SMs more than on others, and hold up the slowest.
    if (device.arch >= 90 && 2 * shape.grid > wave && shape.grid <= wave) {
      shape.smem = smem_for_ctas(kernel, kWaveCtas, device);
    }
    return launch_dependent(kernel, shape, device.arch, stream, p, schedule);
  }
  // Few rows: as many threads as there are vectors, for latency. Many: 4 vectors a thread keep
  // enough loads in flight.
  const bool few = p.rows <= 2 * device.sm_count;
  const int wanted = few ? 1 : 4;
  const int per_thread = std::max(wanted, (vectors + 1023) / 1024);
  shape.grid = p.rows;
  shape.block = ((vectors + per_thread - 1) / per_thread + 31) / 32 * 32;
  auto kernel = per_thread == 1   ? row_quant_kernel<T, 1, kNormalize, kScaling, false, 1024>
                : per_thread == 2 ? row_quant_kernel<T, 2, kNormalize, kScaling, false, 1024>
                                  : row_quant_kernel<T, 4, kNormalize, kScaling, false, 512>;
  if constexpr (sizeof(T) == 2) {
    if (shape.block > 512) kernel = row_quant_kernel<T, 4, kNormalize, kScaling, false, 1024>;
  }
  launch_dependent(kernel, shape, device.arch, stream, p, schedule);
}

template <typename T>
void launch_typed(const RowQuantParams& p, const CurrentDevice& device, cudaStream_t stream) {
  if (!fits_vectors(p)) {
    LaunchShape shape;
    shape.grid = p.rows;
    shape.block = 256;
    return launch_dependent(row_quant_scalar_kernel<T>, shape, device.arch, stream, p,
                            schedule_of(p));
  }
  switch (p.scaling) {
    case RowScale::kNone:
      return launch_vectors<T, true, RowScale::kNone>(p, device, stream);
    case RowScale::kStatic:
      return p.normalize ? launch_vectors<T, true, RowScale::kStatic>(p, device, stream)
                         : launch_vectors<T, false, RowScale::kStatic>(p, device, stream);
    case RowScale::kDynamic:
      return p.normalize ? launch_vectors<T, true, RowScale::kDynamic>(p, device, stream)
                         : launch_vectors<T, false, RowScale::kDynamic>(p, device, stream);
  }
}

}  // namespace

void launch_row_quant(const RowQuantParams& p, cudaStream_t stream) {
  PQ_REQUIRE(p.rows >= 0 && p.rows <= 0x7FFFFFFF,
             "row_quant: rows: expected fewer than 2^31, got " << p.rows);
  PQ_REQUIRE(p.cols >= 1, "row_quant: cols: expected 1 or more, got " << p.cols);
  PQ_REQUIRE((p.scaling == RowScale::kNone) == (p.output == RowResult::kFloat) &&
                 (p.scaling != RowScale::kNone || p.normalize),
             "row_quant: a float output goes with RMSNorm and no scale");
  PQ_REQUIRE(!p.shift || (p.normalize && p.scaling == RowScale::kStatic),
             "row_quant: a shift goes with RMSNorm and a static scale");
  if (p.rows == 0) return;
  const CurrentDevice device;
  switch (p.dtype) {
    case RowDtype::kFloat32:
      return launch_typed<float>(p, device, stream);
    case RowDtype::kBFloat16:
      return launch_typed<__nv_bfloat16>(p, device, stream);
    case RowDtype::kFloat16:
      return launch_typed<__half>(p, device, stream);
  }
}

}  // namespace prefixquant
