// SPDX-License-Identifier: Apache-2.0
// Every file of this folder is compiled once per instruction set (CMake defines PQ_ISA) and puts
// what it defines into prefixquant::PQ_ISA. Such a file includes no C++ standard header with inline
// functions that it would call: the linker keeps one copy of an inline function, and a copy
// compiled with AVX-512 must not end up under the portable kernels. <cmath>'s builtins and
// <cstdint> are safe.
#pragma once

#define PQ_ISA_NAMESPACE_BEGIN \
  namespace prefixquant {      \
  namespace PQ_ISA {
#define PQ_ISA_NAMESPACE_END \
  }                          \
  }
