// SPDX-License-Identifier: Apache-2.0
#include "prefixquant/device_info.h"

#include <cuda_runtime.h>

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

}  // namespace prefixquant
