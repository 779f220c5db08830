// The storage types of the operations whose CUDA kernels compute in float32. For their torch sides.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/tensor.h"

namespace fastarch {

inline Dtype dtype_of(const char* name, const at::Tensor& input) {
  switch (input.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(false, name, ": want float32, bfloat16 or float16, got ", input.scalar_type());
  }
}

}  // namespace fastarch
