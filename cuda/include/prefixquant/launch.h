// SPDX-License-Identifier: Apache-2.0
//
// One launch with the attributes that the row-wise kernels use.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "prefixquant/check.h"

namespace prefixquant {

// What launches ask about the current device.
struct CurrentDevice {
  int arch = 0;  // 10 * major + minor: 90 for an H100
  int sm_count = 0;
  int smem_limit = 0;  // bytes of shared memory a block can have

  CurrentDevice() {
    int device = 0, major = 0, minor = 0;
    PQ_CUDA_CHECK(cudaGetDevice(&device));
    PQ_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    PQ_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    PQ_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
    PQ_CUDA_CHECK(
        cudaDeviceGetAttribute(&smem_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    arch = 10 * major + minor;
  }
};

struct LaunchShape {
  int64_t grid = 1;
  int block = 128;
  size_t smem = 0;
  int cluster = 1;
};

// Lets a kernel have `bytes` of dynamic shared memory beside its static shared memory, which counts
// towards the 48 KB that need no permission. Asks for all there is, so that the launches of several
// host threads do not take each other's permission away.
template <typename Kernel>
void allow_dynamic_smem(Kernel kernel, size_t bytes) {
  cudaFuncAttributes attributes = {};
  PQ_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (static_cast<int64_t>(bytes) <= attributes.maxDynamicSharedSizeBytes) return;
  const int all = CurrentDevice().smem_limit - static_cast<int>(attributes.sharedSizeBytes);
  PQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     std::max(all, static_cast<int>(bytes))));
}

// A cluster of more CTAs needs permission and a device that can hold it.
inline constexpr int kPortableCluster = 8;

template <typename Kernel>
void allow_large_cluster(Kernel kernel) {
  cudaFuncAttributes attributes = {};
  PQ_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.nonPortableClusterSizeAllowed) return;
  PQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// CTAs of `threads` that a cluster of this kernel can have on the current device (sm_90 and later):
// 16 on a whole H100.
template <typename Kernel>
int largest_cluster(Kernel kernel, int threads) {
  allow_large_cluster(kernel);
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(2 * kPortableCluster);
  launch.blockDim = dim3(threads);
  int largest = 0;
  PQ_CUDA_CHECK(cudaOccupancyMaxPotentialClusterSize(&largest, kernel, &launch));
  return largest;
}

// Launches with programmatic dependent launch where the device has it (sm_90): the kernel must wait
// (grid_dependency_wait) before it reads or writes what earlier kernels of the stream touch.
template <typename... Parameters, typename... Arguments>
void launch_dependent(void (*kernel)(Parameters...), const LaunchShape& shape, int arch,
                      cudaStream_t stream, const Arguments&... arguments) {
  if (shape.smem > 0) allow_dynamic_smem(kernel, shape.smem);
  if (shape.cluster > kPortableCluster) allow_large_cluster(kernel);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(shape.grid));
  launch.blockDim = dim3(shape.block);
  launch.dynamicSmemBytes = shape.smem;
  launch.stream = stream;
  launch.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[launch.numAttrs].val.clusterDim.y = 1;
    attributes[launch.numAttrs].val.clusterDim.z = 1;
    ++launch.numAttrs;
  }
  if (arch >= 90) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++launch.numAttrs;
  }
  PQ_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, Parameters(arguments)...));
  PQ_CUDA_CHECK(cudaGetLastError());
}

}  // namespace prefixquant
