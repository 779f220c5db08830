// fastarch._C: how the extension was built, and which instruction set was chosen.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, module) {
  module.attr("version") = FASTARCH_VERSION;
  module.attr("torch") = FASTARCH_TORCH;  // that it was compiled against
#if defined(__clang__)
  module.attr("compiler") = "clang " __clang_version__;
#else
  module.attr("compiler") = "gcc " __VERSION__;
#endif
  module.attr("flags") = FASTARCH_KERNEL_FLAGS;
  module.attr("isas") = pybind11::str(fastarch::built_isas()).attr("split")();
  module.def("isa", [] {
    try {
      return fastarch::isa_name(fastarch::isa());
    } catch (const c10::Error& error) {
      throw pybind11::value_error(error.what_without_backtrace());
    }
  });
}
