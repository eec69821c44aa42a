# SPDX-License-Identifier: Apache-2.0
# Decides PREFIXQUANT_WITH_CUDA from PREFIXQUANT_CUDA and enables the language.
set(PREFIXQUANT_WITH_CUDA OFF)
if(NOT PREFIXQUANT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PREFIXQUANT_CUDA: expected AUTO, ON or OFF, got '${PREFIXQUANT_CUDA}'")
endif()
if(NOT PREFIXQUANT_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  set(_has_gpu OFF)
  if(EXISTS "/dev/nvidia0" OR EXISTS "/dev/dxg") # native driver, or WSL
    set(_has_gpu ON)
  endif()
  if(PREFIXQUANT_CUDA STREQUAL "ON" AND NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "PREFIXQUANT_CUDA=ON: no CUDA compiler found; install the CUDA toolkit "
                        "(12.4 or later) or set CUDACXX to nvcc")
  endif()
  if(CMAKE_CUDA_COMPILER AND (PREFIXQUANT_CUDA STREQUAL "ON" OR _has_gpu))
    set(PREFIXQUANT_WITH_CUDA ON)
  endif()
endif()
if(PREFIXQUANT_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80-real;86-real;89-real;90a-real;90-virtual")
  endif()
  # Static: the extension imports where no CUDA library and no driver is installed.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
endif()
message(
  STATUS
    "prefixquant ${PROJECT_VERSION}: CUDA ${PREFIXQUANT_WITH_CUDA} (${CMAKE_CUDA_ARCHITECTURES})")
