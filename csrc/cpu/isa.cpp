#include "cpu/isa.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace fastarch {
namespace {

Isa from_name(const std::string& variable, const std::string& name) {
  if (name == "generic" || name == "default") return Isa::generic;
  if (name == "avx2") return Isa::avx2;
  if (name == "avx512") return Isa::avx512;
  TORCH_CHECK_VALUE(false, variable, ": want generic, avx2 or avx512, got ", name);
}

// __builtin_cpu_supports includes the operating system's consent (XGETBV) to the wider registers.
Isa supported() {
#if defined(FASTARCH_BUILDS_AVX512)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose() {
  Isa chosen = supported();
  if (const char* name = std::getenv("FASTARCH_CPU_ISA"))
    chosen = std::min(chosen, from_name("FASTARCH_CPU_ISA", name));
  if (const char* name = std::getenv("ATEN_CPU_CAPABILITY")) {
    // torch ignores what it does not know, and so must we: the variable is not ours
    const std::string value = name;
    if (value == "default" || value == "avx2") chosen = std::min(chosen, from_name("ATEN_CPU_CAPABILITY", value));
  }
  return chosen;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

const char* built_isas() {
#if defined(FASTARCH_BUILDS_AVX512)
  return "generic avx2 avx512";
#else
  return "generic";
#endif
}

}  // namespace fastarch
