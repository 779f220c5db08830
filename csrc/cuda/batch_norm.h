// batch_norm on CUDA, for rows of channels and the batch's own statistics: what the torch side hands to the kernels.
//
//   y = act((x - mean) weight / sqrt(var + eps) + bias + residual), mean and var (biased) of each column of x
//
// x, residual, y, dy, dz, dx [M, C], contiguous; weight, bias, mean, var, dweight, dbias [C]; mask [M, ceil(C / 8)].
// fastarch/ops/batch_norm.py defines `mask` and the gradients; batch_norm.cpp checks what memory safety needs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensor.h"

namespace fastarch {

struct BatchNormFwd {
  int64_t M;
  int C;
  float eps;
  bool relu;
  const void *x, *residual;    // residual: null for none
  const float *weight, *bias;  // null for 1 and 0
  void* y;
  float *mean, *var;
  uint8_t* mask;  // null if not wanted
};

struct BatchNormBwd {
  int64_t M;
  int C;
  float eps;
  bool relu;
  const void *dy, *x;
  const uint8_t* mask;         // null: what passed ReLU is computed again
  const float *weight, *bias;  // null for 1 and 0
  const float *mean, *var;
  void *dx, *dz;           // null if not wanted
  float *dweight, *dbias;  // null if not wanted
};

// How a launch spreads over a device. A slice of `lanes` x 8 channels is shared by `shares` blocks, which deal its rows
// out in tiles of a block's threads; `groups` slices are under way at a time.
struct BatchNormPlan {
  int lanes, slices, groups, rounds, shares;
  int tiles, longer, missing;  // of a share; shares that have one more; rows that the last tile lacks
  int kept;                    // tiles of a block that stay in shared memory; it reads the others twice
  size_t shared_bytes;
};

// The plan for the current device. The launch then needs memory for `partial` [plan.shares, C, 2].
cudaError_t plan_batch_norm_fwd(const BatchNormFwd& args, Dtype dtype, BatchNormPlan& plan);
cudaError_t plan_batch_norm_bwd(const BatchNormBwd& args, Dtype dtype, BatchNormPlan& plan);

cudaError_t batch_norm_fwd(const BatchNormFwd& args, const BatchNormPlan& plan, float* partial, Dtype dtype,
                           cudaStream_t stream);
cudaError_t batch_norm_bwd(const BatchNormBwd& args, const BatchNormPlan& plan, float* partial, Dtype dtype,
                           cudaStream_t stream);

}  // namespace fastarch
