// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace prefixquant {

// The number of CUDA devices that this process can use; 0 without a driver.
int cuda_device_count();

}  // namespace prefixquant
