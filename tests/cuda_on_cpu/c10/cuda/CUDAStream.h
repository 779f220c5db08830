// Stands in for torch's header: there is one stream, and it needs no handle.
#pragma once

#include "cuda_on_cpu.h"

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() { return nullptr; }

}  // namespace c10::cuda
