// What the two backward kernels share. Every gradient g that survives max pool and ReLU belongs to one place of the
// convolution, whose patch of the input (the filter's footprint) it meets:
//
//   dw[k] = sum over places  g * patch(x, place)          patch(dx, place) += sum over k  g * w[k]
//
// The two are mirror images: both accumulate patches in registers, one over places at a fixed k, the other over k at a
// fixed place. Of the places under a 2x2 max pool three in four carry no gradient, and cost nothing.
#pragma once

#include "cpu/conv_relu_pool_tile.h"
#include "cpu/conv_relu_pool_window.h"

namespace {

// Registers for a patch, which leaves some for the gradient, a mask and operands in flight.
constexpr int PATCH_VECTORS = VECTOR_REGISTERS == 32 ? 28 : 12;
constexpr int RUN_VECTORS = 7;  // the longest run of a patch
constexpr int PATCH_RUNS = 7;   // the most runs that accumulate at once

// How patches are cut: blocks of channels, in each of them the filter's runs, padded to whole vectors.
struct Patch {
  int64_t channels, blocks;
  Runs runs;
  int64_t vectors;  // of one run

  FASTARCH_INLINE Patch(const ConvReluPool& p, int64_t lanes, int64_t wanted)
      : channels(width(p, lanes, wanted)),
        blocks(ceil_div(p.C, channels)),
        runs(p, channels, p.dilation_w == 1 && p.S * channels <= RUN_VECTORS * lanes),
        vectors(ceil_div(runs.length, lanes)) {}

  FASTARCH_INLINE int64_t elements(int64_t lanes) const { return runs.count * vectors * lanes; }

  // Calls f(place, step, tap, taps): where taps [tap, tap + taps) of a block's first channel stand in its patch, a step
  // apart; the next channel's stand beside them.
  template <class F>
  FASTARCH_INLINE void each_row(const ConvReluPool& p, int64_t lanes, const F& f) const {
    if (!runs.rows) return f(0, vectors * lanes, 0, p.R * p.S);
    for (int64_t r = 0; r < p.R; r++) f(r * vectors * lanes, channels, r * p.S, p.S);
  }

  // Channels of one block: all if whole rows of them make one run, else `wanted` vectors or what fits into a run.
  static FASTARCH_INLINE int64_t width(const ConvReluPool& p, int64_t lanes, int64_t wanted) {
    if ((p.dilation_w == 1 ? p.S : 1) * p.C <= RUN_VECTORS * lanes) return p.C;
    const int64_t fitting = p.dilation_w == 1 ? RUN_VECTORS / p.S : RUN_VECTORS;
    return lanes * most(1, least(wanted, fitting));
  }
};

// Runs of a patch that accumulate at once.
FASTARCH_INLINE int64_t runs_at_once(int64_t vectors) { return least(PATCH_RUNS, PATCH_VECTORS / vectors); }

// F::at<RUNS, VECTORS> for the numbers at hand, runs <= runs_at_once(vectors).
template <class F, int RUNS = PATCH_RUNS, int VECTORS = RUN_VECTORS>
FASTARCH_INLINE auto patch_function(int64_t runs, int64_t vectors) {
  if constexpr (VECTORS > 1) {
    if (vectors < VECTORS) return patch_function<F, RUNS, VECTORS - 1>(runs, vectors);
  }
  if constexpr (RUNS > 1) {
    if (runs < RUNS) return patch_function<F, RUNS - 1, VECTORS>(runs, vectors);
  }
  return &F::template at<(RUNS * VECTORS > PATCH_VECTORS ? 1 : RUNS), VECTORS>;
}

// Visits fn(first run, runs) in pieces that fit the registers.
template <class Visit>
FASTARCH_INLINE void pieces(const Patch& patch, const Visit& visit) {
  const int64_t most_runs = runs_at_once(patch.vectors);
  for (int64_t run = 0; run < patch.runs.count; run += most_runs) visit(run, least(most_runs, patch.runs.count - run));
}

}  // namespace
