// SPDX-License-Identifier: Apache-2.0
// The instruction set the CPU kernels use: the best one that was compiled and that this CPU has, or
// the one asked for by PREFIXQUANT_ISA / set_isa().
#pragma once

#include <string>
#include <vector>

namespace prefixquant {

enum class Isa { kPortable, kAvx2, kAvx512, kAmx };  // kAvx512 includes VNNI; kAmx is AMX-INT8

Isa current_isa();
std::string isa_name(Isa isa);
std::vector<std::string> available_isas();  // worst first
// Throws std::invalid_argument when `name` is unknown, was not compiled, or the CPU lacks it.
void set_isa(const std::string& name);

// The copy of a kernel that was compiled for the current instruction set, from a table that each
// operation fills with PQ_KERNEL_TABLE(name).
template <typename Fn>
struct KernelTable {
  Fn* portable;
  Fn* avx2;
  Fn* avx512;
  Fn* amx;

  Fn* pick() const {
    switch (current_isa()) {
      case Isa::kAmx:
        if (amx) return amx;
        [[fallthrough]];
      case Isa::kAvx512:
        if (avx512) return avx512;
        [[fallthrough]];
      case Isa::kAvx2:
        if (avx2) return avx2;
        [[fallthrough]];
      case Isa::kPortable:
        break;
    }
    return portable;
  }
};

}  // namespace prefixquant

#ifdef PREFIXQUANT_HAVE_avx2
#define PQ_IF_AVX2(x) x
#else
#define PQ_IF_AVX2(x) nullptr
#endif
#ifdef PREFIXQUANT_HAVE_avx512
#define PQ_IF_AVX512(x) x
#else
#define PQ_IF_AVX512(x) nullptr
#endif
#ifdef PREFIXQUANT_HAVE_amx
#define PQ_IF_AMX(x) x
#else
#define PQ_IF_AMX(x) nullptr
#endif

// Declares the compiled copies of kernel `name` (signature `Fn`) and the table that picks one.
#define PQ_KERNEL_TABLE(Fn, name)                                                            \
  namespace portable {                                                                       \
  Fn name;                                                                                   \
  }                                                                                          \
  namespace avx2 {                                                                           \
  Fn name;                                                                                   \
  }                                                                                          \
  namespace avx512 {                                                                         \
  Fn name;                                                                                   \
  }                                                                                          \
  namespace amx {                                                                            \
  Fn name;                                                                                   \
  }                                                                                          \
  static const KernelTable<Fn> name##_table {                                                \
    portable::name, PQ_IF_AVX2(avx2::name), PQ_IF_AVX512(avx512::name), PQ_IF_AMX(amx::name) \
  }
