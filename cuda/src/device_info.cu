// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/device_info.h"

#include <cuda_runtime.h>

#include "prefixquant/check.h"

namespace prefixquant {

int cuda_device_count() {
  int count = 0;
  // No driver and no device are ordinary answers here, not errors.
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

DeviceInfo cuda_device_info(int device) {
  int sm_count = 0, major = 0, minor = 0;
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  PQ_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return {sm_count, 10 * major + minor};
}

uint64_t cuda_capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  PQ_CUDA_CHECK(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace prefixquant
