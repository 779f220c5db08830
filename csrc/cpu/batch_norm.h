// batch_norm on CPUs: what the torch side and the kernels, which know no torch, agree on.
#pragma once

#include <stdint.h>

#include "cpu/element_type.h"
#include "cpu/isa.h"
#include "cpu/range.h"

// y = relu((x - mean) * scale + bias + residual), scale = weight / sqrt(var + eps), channel by channel.
struct BatchNorm {
  int64_t N, C, S;  // x, y [N, C, S] in planes of S elements, or [N, C] in rows of C
  bool rows;
  bool relu;
  double eps;
  bool centred =
      false;  // whether dx has the means of dz and dz xhat taken off: not where the statistics were constants
};

// So many channels of planes, at most, are worked on together.
constexpr int64_t CHANNELS_TOGETHER = 32;

// A mask holds one bit per element that passed ReLU, in rows of whole bytes: of C elements, or of planes of S.
inline int64_t mask_bytes(int64_t inner) { return (inner + 7) / 8; }

// Per channel, in the type that the kernels compute in; nullptr for weight 1, bias 0.
struct Affine {
  const void *weight, *bias;
};

// Kernels of one element type. Every range is of n or of channels. `moments` and `sums` hold [parts, 2, C].
struct BatchNormFwd {
  int64_t (*scratch_bytes)(const BatchNorm&);
  // The mean and the sum of squared deviations from it, over a part, of planes CHANNELS_TOGETHER at most; mean and var
  // (biased) of all parts.
  void (*moments)(const BatchNorm&, const void* x, Range n, Range c, double* moments, void* scratch);
  void (*statistics)(const BatchNorm&, const double* moments, int64_t parts, Range c, void* mean, void* var);
  int64_t (*constants_bytes)(const BatchNorm&);
  void (*constants)(const BatchNorm&, Affine, const void* mean, const void* var, Range c, void* constants);
  void (*apply)(const BatchNorm&, const void* x, const void* residual, const void* constants, void* y, uint8_t* mask,
                Range n, Range c);
};
struct BatchNormFwds {
  BatchNormFwd of[ELEMENT_TYPES];
};

// With z = batch_norm(x) + residual, dz = dy where ReLU passed: where the mask says so or, without one, where
// (x - mean) * scale + bias is not <= 0.
struct BatchNormBwd {
  int64_t (*scratch_bytes)(const BatchNorm&);
  int64_t (*constants_bytes)(const BatchNorm&);
  // What sums need, and after them what apply needs: dx = scale * dz + (x - mean) * slope + offset, by the means of dz
  // and dz xhat, nullptr for 0.
  void (*constants)(const BatchNorm&, Affine, const void* mean, const void* var, Range c, void* constants);
  void (*means)(const BatchNorm&, const void* var, const void* mean_dz, const void* mean_dz_xhat, Range c,
                void* constants);
  // The sums of dz and of dz (x - mean) over a part, of planes CHANNELS_TOGETHER at most; dbias and dweight, and the
  // two means of all parts.
  void (*sums)(const BatchNorm&, const void* dy, const void* x, const uint8_t* mask, const void* constants, Range n,
               Range c, double* sums, void* scratch);
  void (*gradients)(const BatchNorm&, const void* var, const double* sums, int64_t parts, Range c, void* constants,
                    void* dweight, void* dbias);
  void (*apply)(const BatchNorm&, const void* dy, const void* x, const uint8_t* mask, const void* constants, void* dx,
                void* dresidual, Range n, Range c);
};
struct BatchNormBwds {
  BatchNormBwd of[ELEMENT_TYPES];
};

FASTARCH_DECLARE(BatchNormFwds, batch_norm_fwd);
FASTARCH_DECLARE(BatchNormBwds, batch_norm_bwd);
