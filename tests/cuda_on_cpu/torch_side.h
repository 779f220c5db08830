// Included before an operation's torch side (csrc/cuda/<op>.cpp), so that it registers for CPU tensors: then
// torch.ops.fastarch.<op> runs the whole CUDA path, checks and launches included, on the CPU.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#define CUDA CPU  // the dispatch key in TORCH_LIBRARY_IMPL(fastarch, CUDA, m)
