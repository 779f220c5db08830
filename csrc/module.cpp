// fastarch._C: how the extension was built, and which instruction set was chosen.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, module) {
  module.attr("version") = FASTARCH_VERSION;
#if defined(__clang__)
  module.attr("compiler") = "clang " __clang_version__;
#else
  module.attr("compiler") = "gcc " __VERSION__;
#endif
  module.attr("flags") = FASTARCH_KERNEL_FLAGS;
  module.attr("isas") = pybind11::str(fastarch::built_isas()).attr("split")();
  module.attr("isa") = fastarch::isa_name(fastarch::isa());
}
