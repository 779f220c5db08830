// The instruction sets that the kernels are compiled for, and the one that this process uses.
#pragma once

namespace fastarch {

enum class Isa { generic, avx2, avx512 };

// The best instruction set that was built, that processor and operating system support, and that neither
// FASTARCH_CPU_ISA nor ATEN_CPU_CAPABILITY forbids. Chosen once.
Isa isa();

const char* isa_name(Isa isa);

// Their names, separated by spaces.
const char* built_isas();

}  // namespace fastarch

// A table of kernels exists once per instruction set, as <table>_<isa>; FASTARCH_SELECT picks the chosen one.
#if defined(FASTARCH_BUILDS_AVX512)
#define FASTARCH_DECLARE(type, table) extern "C" const type table##_generic, table##_avx2, table##_avx512
#define FASTARCH_SELECT(table)                                   \
  (::fastarch::isa() == ::fastarch::Isa::avx512 ? table##_avx512 \
   : ::fastarch::isa() == ::fastarch::Isa::avx2 ? table##_avx2   \
                                                : table##_generic)
#else
#define FASTARCH_DECLARE(type, table) extern "C" const type table##_generic
#define FASTARCH_SELECT(table) (table##_generic)
#endif

// The name under which a kernel source, compiled with -DFASTARCH_ISA=<isa>, exports a table.
#define FASTARCH_JOIN_(table, isa) table##_##isa
#define FASTARCH_JOIN(table, isa) FASTARCH_JOIN_(table, isa)
#define FASTARCH_EXPORT(type, table)                                                              \
  extern "C" __attribute__((visibility("hidden"))) const type FASTARCH_JOIN(table, FASTARCH_ISA); \
  const type FASTARCH_JOIN(table, FASTARCH_ISA)
