// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <cstdlib>

#include "check.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prefixquant {
namespace {

// Linux hands out the 8 KB AMX tile state only to processes that ask (arch_prctl, since 5.16).
bool request_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
#else
  return false;
#endif
}

bool cpu_has(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kAvx2:
      return has_avx2;
    case Isa::kAvx512:
      return has_avx512;
    case Isa::kAmx: {
      // CPUID leaf 7: EDX bit 24 is AMX-TILE, bit 25 AMX-INT8 (not known to every
      // __builtin_cpu_supports).
      unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
      __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
      return has_avx512 && (edx >> 24 & 3) == 3 && request_amx();
    }
    default:
      return false;
  }
#else
  return false;
#endif
}

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return static_cast<bool>(PQ_IF_AVX2(true));
    case Isa::kAvx512:
      return static_cast<bool>(PQ_IF_AVX512(true));
    case Isa::kAmx:
      return static_cast<bool>(PQ_IF_AMX(true));
  }
  return false;
}

constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

bool usable(Isa isa) { return compiled(isa) && cpu_has(isa); }

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa parse(const char* source, const std::string& name) {
  for (Isa isa : kAllIsas) {
    if (isa_name(isa) == name && usable(isa)) return isa;
  }
  throw std::invalid_argument(concat(source, ": expected one of ", joined(available_isas()),
                                     " (what this build and this CPU have), got '", name, "'"));
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa = [] {
    if (const char* name = std::getenv("PREFIXQUANT_ISA")) return parse("PREFIXQUANT_ISA", name);
    Isa best = Isa::kPortable;
    for (Isa candidate : kAllIsas) {
      if (usable(candidate)) best = candidate;
    }
    return best;
  }();
  return isa;
}

}  // namespace

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAllIsas) {
    if (usable(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { selected().store(parse("set_isa", name)); }

}  // namespace prefixquant
