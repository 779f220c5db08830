// conv_relu_pool on CPUs: what the torch side and the kernels, which know no torch, agree on.
#pragma once

#include <stdint.h>

#include "cpu/element_type.h"
#include "cpu/isa.h"

struct Strides4 {
  int64_t n, c, h, w;
};

// Of filters w [k][c][tap], tap = r * S + s, dense, with their taps or their channels side by side; also of dw.
struct FilterStrides {
  int64_t k, c, tap;
};

// y = pool(relu(a conv2d(x, w) + b + r)), group by group, or without ReLU and pool. Extents and strides count elements.
struct ConvReluPool {
  int64_t N, G;            // batch, groups
  int64_t C, H, W;         // input channels of one group, rows, columns
  int64_t K, R, S;         // output channels of one group, filter rows, columns
  int64_t OH, OW, PH, PW;  // rows and columns of the convolution and of the pooled output
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t pool_h, pool_w, pool_stride_h, pool_stride_w, pool_padding_h, pool_padding_w;
  bool average;
  bool relu;             // false: nothing is pooled either, and no index wanted
  bool turned;           // filters are turned by half a turn, for the gradient of the input: only Winograd can
  Strides4 x, y, index;  // of the input or its gradient, of the output or its gradient, of the index
  FilterStrides w;
  int64_t threads;  // for how many the work is to be cut; no result depends on it
};

constexpr int CUT = 255;         // the index of a max window that ReLU cut off
constexpr int MAX_WINDOW = 255;  // elements of the largest max window, which the other values number
constexpr int AVG_WINDOW = 8;    // elements of the largest average window: bits of an index

// A forward algorithm for one element type. The caller allocates `packed` and one `scratch` per thread, runs all pack
// tasks, then all tasks, in any order and on any threads. index == nullptr: not wanted. The scale a of each output
// channel is of the type that kernels compute in, or nullptr for 1. The residual r is laid out as y, or nullptr for 0;
// only where nothing is pooled and no index wanted.
struct ConvReluPoolFwd {
  int64_t (*packed_bytes)(const ConvReluPool&);
  int64_t (*pack_tasks)(const ConvReluPool&);
  void (*pack)(const ConvReluPool&, const void* weight, const void* scale, const void* bias, void* packed,
               int64_t task);
  int64_t (*scratch_bytes)(const ConvReluPool&);
  int64_t (*tasks)(const ConvReluPool&);
  void (*run)(const ConvReluPool&, const void* x, const void* packed, const void* r, void* y, uint8_t* index,
              int64_t task, void* scratch);
};
struct ConvReluPoolFwds {
  ConvReluPoolFwd of[ELEMENT_TYPES];
};

// The gradients of weight and bias: all tasks, then finish for each of the G * K output channels.
struct ConvReluPoolBwdWeight {
  int64_t (*sums_bytes)(const ConvReluPool&);
  int64_t (*scratch_bytes)(const ConvReluPool&);
  int64_t (*tasks)(const ConvReluPool&);
  void (*run)(const ConvReluPool&, const void* x, const void* dy, const uint8_t* index, void* sums, int64_t task,
              void* scratch);
  void (*finish)(const ConvReluPool&, void* sums, void* dw, void* db, int64_t channel);
};
struct ConvReluPoolBwdWeights {
  ConvReluPoolBwdWeight of[ELEMENT_TYPES];
};

// The gradient of the input: all pack tasks, then all tasks.
struct ConvReluPoolBwdInput {
  int64_t (*packed_bytes)(const ConvReluPool&);
  int64_t (*pack_tasks)(const ConvReluPool&);
  void (*pack)(const ConvReluPool&, const void* weight, void* packed, int64_t task);
  int64_t (*scratch_bytes)(const ConvReluPool&);
  int64_t (*tasks)(const ConvReluPool&);
  void (*run)(const ConvReluPool&, const void* packed, const void* dy, const uint8_t* index, void* dx, int64_t task,
              void* scratch);
};
struct ConvReluPoolBwdInputs {
  ConvReluPoolBwdInput of[ELEMENT_TYPES];
};

FASTARCH_DECLARE(ConvReluPoolFwds, conv_relu_pool_direct);     // any convolution
FASTARCH_DECLARE(ConvReluPoolFwds, conv_relu_pool_winograd);   // 3x3, stride 1, dilation 1; max pool 2x2 or none
FASTARCH_DECLARE(ConvReluPoolFwds, conv_relu_pool_polyphase);  // up to 4 taps per step of the stride, dilation 1
FASTARCH_DECLARE(ConvReluPoolFwds, conv_relu_pool_library);    // x is a finished convolution [N, OH, OW, G * K]
FASTARCH_DECLARE(ConvReluPoolBwdWeights, conv_relu_pool_bwd_weight);
FASTARCH_DECLARE(ConvReluPoolBwdWeights, conv_relu_pool_winograd_bwd_weight);  // one group, no pool, no index
FASTARCH_DECLARE(ConvReluPoolBwdInputs, conv_relu_pool_bwd_input);
