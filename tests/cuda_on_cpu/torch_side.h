// Included before an operation's torch side (csrc/cuda/<op>.cpp), so that it registers for CPU tensors: then
// torch.ops.fastarch.<op> runs the whole CUDA path, checks and launches included, on the CPU. It brings no header that
// a torch side does not have anyway: one that forgets an include must fail here as it does in the real build.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, device, m) _TORCH_LIBRARY_IMPL(library, CPU, m, C10_UID)
