// fastarch._cuda: loading it registers the CUDA kernels with torch. It says which architectures they were built for.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, module) { module.attr("architectures") = FASTARCH_CUDA_ARCHITECTURES; }
