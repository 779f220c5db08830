// Ranges of indices, and their division.
#pragma once

#include <stdint.h>

#include "cpu/simd.h"

struct Range {
  int64_t begin, end;
};

namespace {

FASTARCH_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTARCH_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FASTARCH_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FASTARCH_INLINE int64_t size(Range r) { return r.end - r.begin; }

// Part i of n things that are cut into `parts`.
FASTARCH_INLINE Range part_of(int64_t n, int64_t parts, int64_t i) { return {n * i / parts, n * (i + 1) / parts}; }

}  // namespace
