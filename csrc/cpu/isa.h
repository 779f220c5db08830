// The instruction sets the kernels are compiled for, and the one that this process uses.
#pragma once

#include <string>
#include <vector>

namespace fastarch {

enum class Isa { generic, avx2, avx512 };

// The best instruction set that was built, that processor and OS support, and that neither FASTARCH_CPU_ISA nor
// ATEN_CPU_CAPABILITY forbids. Chosen once.
Isa isa();

const char* isa_name(Isa isa);
std::vector<std::string> built_isas();

}  // namespace fastarch

// A table of kernels exists once per instruction set, as <table>_<isa>. FASTARCH_SELECT picks the chosen one.
#if defined(FASTARCH_BUILDS_AVX512)
#define FASTARCH_DECLARE(type, table) extern "C" const type table##_generic, table##_avx2, table##_avx512
#define FASTARCH_SELECT(table)                              \
  (::fastarch::isa() == ::fastarch::Isa::avx512 ? table##_avx512 \
   : ::fastarch::isa() == ::fastarch::Isa::avx2 ? table##_avx2   \
                                                : table##_generic)
#else
#define FASTARCH_DECLARE(type, table) extern "C" const type table##_generic
#define FASTARCH_SELECT(table) (table##_generic)
#endif
