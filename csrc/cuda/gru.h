// gru on CUDA, a whole sequence in one launch: what the torch side hands to the kernels.
//
//   r_t = sigmoid(p_r + W_hr h_{t-1} + b_hr),  z_t likewise,  n_t = tanh(p_n + r_t * (W_hn h_{t-1} + b_hn))
//   h_t = (1 - z_t) n_t + z_t h_{t-1},  p_t = W_i x_t + b_i
//
// h0, h_n, dh_n, dh0 [N, H]; output, dy [T, N, H]; projected [T, N, 3H] holds p in the order r, z, n; w_hh [3H, H];
// b_hh [3H]; gates [T, N, 4, H] is r, z, n, a_n = W_hn h_{t-1} + b_hn; da [T, N, 4, H] is dr, dz, dn before the gates'
// nonlinearities, and dn * r. All contiguous and of the dtype. fastarch/ops/gru.py has the backward's equations.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/tensor.h"

namespace fastarch {

struct GruWalk {
  int64_t T;
  int N, H;
  bool reverse;
  bool tf32;  // whether products in float32 may round what they multiply to TF32
  const void *h0, *w_hh;
  const int64_t* lengths;  // [N]; null for T
};

struct GruFwd {
  GruWalk walk;
  const void *projected, *b_hh;  // b_hh: null for 0
  void *output, *h_n;
  void* gates;  // null if not wanted
};

struct GruBwd {
  GruWalk walk;
  const void *dy, *dh_n;  // null for 0
  const void *output, *gates;
  void *da, *dh0;  // null if not wanted
};

// How a launch spreads over a device: a block owns `tiles` x 16 hidden units of a slice of `rows` sequences, of which
// it takes 8 x `columns` at a time.
struct GruPlan {
  int tiles, rows, columns;
  int unit_slices, batch_slices;  // blocks; unit_slices is 0 where the weights fit nowhere
  int chunks;                     // of 64 bytes in a row of what the blocks exchange
  size_t shared_bytes;
  int64_t exchange_bytes, counter_bytes;
};

// The plan for the current device. The launch then needs the three memories of GruMemory.
cudaError_t plan_gru_fwd(const GruWalk& walk, Dtype dtype, GruPlan& plan);
cudaError_t plan_gru_bwd(const GruWalk& walk, Dtype dtype, GruPlan& plan);

struct GruMemory {
  void* exchange;      // plan.exchange_bytes, all 0
  unsigned* counters;  // plan.counter_bytes, all 0
  float* state;        // [N, H]
};

cudaError_t gru_fwd(const GruFwd& args, const GruPlan& plan, const GruMemory& memory, Dtype dtype, cudaStream_t stream);
cudaError_t gru_bwd(const GruBwd& args, const GruPlan& plan, const GruMemory& memory, Dtype dtype, cudaStream_t stream);

}  // namespace fastarch
