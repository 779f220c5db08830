// conv_relu_pool on CUDA for few input channels: what the torch side hands to the kernels.
//
//   conv[n, k, i, j] = b[k] + sum_{c, r, s} x[n, c, i stride_h + r dilation_h - padding_h, ...] w[k, c, r, s]
//   y[n, k, p, q]    = maximum or mean over the window at (p, q) of relu(conv[n, k, ., .])
//
// x, dx [N, C, H, W]; w, dw [K, C, R, S]; b, db [K]; conv [N, K, OH, OW]; y, dy, index [N, K, PH, PW].
// fastarch/ops/conv_relu_pool.py defines `index` and checks what callers pass; conv_relu_pool.cpp checks what memory
// safety needs. "none" is a maximum over windows of one element.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/tensor.h"

namespace fastarch {

struct ConvReluPoolShape {
  int N, C, H, W, K, R, S, OH, OW, PH, PW;
  Extent stride, padding, dilation;
  Extent pool_size, pool_stride, pool_padding;
  bool average;  // else maximum
};

struct ConvReluPoolFwd {
  ConvReluPoolShape shape;
  ConstTensor4 x, w;
  const void* b;  // contiguous; null for none
  Tensor4 y;
  uint8_t* index;  // at y's strides; null if not wanted
};

struct ConvReluPoolBwdInput {
  ConvReluPoolShape shape;
  ConstTensor4 dy, index, w;
  Tensor4 dx;
};

struct ConvReluPoolBwdWeight {
  ConvReluPoolShape shape;
  ConstTensor4 dy, index, x;
  void* partial;  // [conv_relu_pool_bwd_weight_partials, K, C R S + 1] in the accumulation type
  void* dw;       // contiguous; null if not wanted
  void* db;       // contiguous; null if not wanted
};

// Whether the kernels serve a shape: few input channels and taps, and the smallest tile fits shared memory.
bool conv_relu_pool_fwd_fits(const ConvReluPoolShape& shape, Dtype dtype);
bool conv_relu_pool_bwd_input_fits(const ConvReluPoolShape& shape, Dtype dtype);
bool conv_relu_pool_bwd_weight_fits(const ConvReluPoolShape& shape, Dtype dtype);

// Partial sums of dw that the launch below makes: a function of the shape alone, so that dw is the same on every GPU.
int conv_relu_pool_bwd_weight_partials(const ConvReluPoolShape& shape, Dtype dtype);

cudaError_t conv_relu_pool_fwd(const ConvReluPoolFwd& args, Dtype dtype, cudaStream_t stream);
cudaError_t conv_relu_pool_bwd_input(const ConvReluPoolBwdInput& args, Dtype dtype, cudaStream_t stream);
cudaError_t conv_relu_pool_bwd_weight(const ConvReluPoolBwdWeight& args, Dtype dtype, cudaStream_t stream);

}  // namespace fastarch
