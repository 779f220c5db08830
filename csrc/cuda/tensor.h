// How tensors reach the CUDA kernels: a pointer, strides and a dtype.
#pragma once

#include <cstdint>

namespace fastarch {

enum class Dtype { float32, float64, bfloat16, float16 };

struct Extent {
  int h, w;
};

// A tensor of four dimensions, with its strides in elements: offsets are 64 bits wide, strides may be 0.
struct Tensor4 {
  void* data;
  int64_t stride[4];
};

struct ConstTensor4 {
  const void* data;
  int64_t stride[4];
};

}  // namespace fastarch
