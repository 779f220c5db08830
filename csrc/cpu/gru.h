// gru on CPUs: what the torch side and the kernels, which know no torch, agree on. fastarch/ops/gru.py has the
// equations.
#pragma once

#include <stdint.h>

#include "cpu/element_type.h"
#include "cpu/isa.h"
#include "cpu/team.h"

// x [T, N, C], h [N, H], all contiguous.
struct Gru {
  int64_t T, N, C, H;
  bool reverse, reset_after;
  const int64_t* lengths;  // [N], nullptr for T
};

struct GruFwd {
  const void *x, *h0, *w_ih, *w_hh, *b_ih, *b_hh;  // nullptr for biases of 0
  void *output, *h_n, *gates;                      // gates: nullptr if not wanted
};

// Gradients that are not wanted are nullptr, and so may be one of dy and dh_n, for 0.
struct GruBwd {
  const void *dy, *dh_n, *x, *h0, *w_ih, *w_hh, *output, *gates;
  void *dx, *dh0, *dw_ih, *dw_hh, *db_ih, *db_hh;
};

// Kernels of one element type. All threads of a team call run, with the same memory of memory_bytes.
struct GruFwdKernel {
  int64_t (*memory_bytes)(const Gru&, const Team&);
  void (*run)(const Gru&, const GruFwd&, const Team&, void* memory);
};
struct GruFwdKernels {
  GruFwdKernel of[ELEMENT_TYPES];
};
struct GruBwdKernel {
  int64_t (*memory_bytes)(const Gru&, const Team&);
  void (*run)(const Gru&, const GruBwd&, const Team&, void* memory);
};
struct GruBwdKernels {
  GruBwdKernel of[ELEMENT_TYPES];
};

FASTARCH_DECLARE(GruFwdKernels, gru_fwd);
FASTARCH_DECLARE(GruBwdKernels, gru_bwd);
