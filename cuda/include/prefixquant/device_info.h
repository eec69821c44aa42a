// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace prefixquant {

// The number of CUDA devices that this process can use; 0 without a driver.
int cuda_device_count();

struct DeviceInfo {
  int sm_count;
  int arch;  // 10 * major + minor: 90 for an H100
};
// Throws std::runtime_error for a device that does not exist.
DeviceInfo cuda_device_info(int device);

// The id of the graph capture that a stream (a cudaStream_t) is part of; 0 outside a capture.
uint64_t cuda_capture_id(void* stream);

}  // namespace prefixquant
