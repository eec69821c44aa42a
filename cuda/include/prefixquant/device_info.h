// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace prefixquant {

// The number of CUDA devices that this process can use; 0 without a driver.
int cuda_device_count();

struct DeviceInfo {
  int sm_count;
  int arch;  // 10 * major + minor: 90 for an H100
};
// Throws std::runtime_error for a device that does not exist.
DeviceInfo cuda_device_info(int device);

}  // namespace prefixquant
