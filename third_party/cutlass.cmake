# SPDX-License-Identifier: Apache-2.0
# Finds the CUTLASS headers and defines the interface target prefixquant_cutlass.
# Order: -DCUTLASS_DIR (a source tree), then the PyPI package nvidia-cutlass (site-packages is on
# CMAKE_PREFIX_PATH in a scikit-build-core build), then the Python on PATH. Nothing is downloaded.
find_path(
  CUTLASS_INCLUDE_DIR cutlass/cutlass.h
  HINTS "${CUTLASS_DIR}/include"
  PATH_SUFFIXES cutlass_library/source/include)
if(NOT CUTLASS_INCLUDE_DIR)
  find_package(Python COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    # find_spec, not import: importing cutlass_library runs its kernel generator.
    execute_process(
      COMMAND
        "${Python_EXECUTABLE}" -c
        "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
      OUTPUT_VARIABLE _cutlass_package
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_path(CUTLASS_INCLUDE_DIR cutlass/cutlass.h HINTS "${_cutlass_package}/source/include")
  endif()
endif()
if(NOT CUTLASS_INCLUDE_DIR)
  message(FATAL_ERROR "CUTLASS headers not found: pip install nvidia-cutlass==4.2.0.0, or pass "
                      "-DCUTLASS_DIR=<CUTLASS source tree>")
endif()
message(STATUS "CUTLASS headers: ${CUTLASS_INCLUDE_DIR}")
add_library(prefixquant_cutlass INTERFACE)
target_include_directories(prefixquant_cutlass SYSTEM INTERFACE "${CUTLASS_INCLUDE_DIR}")
