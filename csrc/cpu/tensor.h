// What the torch sides of the operations ask of their tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/element_type.h"

namespace fastarch {

inline ElementType element_type(const char* operation, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return FLOAT32;
    case at::kDouble:
      return FLOAT64;
    case at::kBFloat16:
      return BFLOAT16;
    case at::kHalf:
      return FLOAT16;
    default:
      TORCH_CHECK_TYPE(false, operation, ": want float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

}  // namespace fastarch
