// A channels-last, zero-padded tile of the input, in the type that kernels compute in.
#pragma once

#include "cpu/conv_relu_pool.h"
#include "cpu/layout.h"

namespace {

// A filter's elements (r, s, c) over such a tile, as runs that are contiguous in it: whole rows s, c where the filter is
// not dilated along them, single taps c otherwise.
struct Runs {
  int64_t count, length;
  explicit Runs(const ConvReluPool& p, int64_t channels)
      : count(p.dilation_w == 1 ? p.R : p.R * p.S), length(p.dilation_w == 1 ? p.S * channels : channels) {}
  // Where run i starts in a tile of the given row length, relative to the filter's own place.
  int64_t offset(const ConvReluPool& p, int64_t i, int64_t row, int64_t channels) const {
    if (p.dilation_w == 1) return i * p.dilation_h * row;
    return i / p.S * p.dilation_h * row + i % p.S * p.dilation_w * channels;
  }
};

// tile[i][j][c] = x[c][top + i - padding_h][left + j - padding_w], or 0 outside, for i < rows, j < columns, c < channels;
// channels [live, channels) are 0. x points to the first channel of the image.
template <class Storage>
void load_tile(const ConvReluPool& p, const Storage* x, int64_t top, int64_t left, int64_t rows, int64_t columns,
               int64_t channels, int64_t live, Compute<Storage>* tile) {
  using T = Compute<Storage>;
  int64_t begin = p.padding_w - left, end = p.W + p.padding_w - left;  // columns that x has
  begin = begin < 0 ? 0 : begin > columns ? columns : begin;
  end = end > columns ? columns : end < begin ? begin : end;
  for (int64_t i = 0; i < rows; i++, tile += columns * channels) {
    const int64_t h = top + i - p.padding_h;
    if (h < 0 || h >= p.H || live < channels) memset(tile, 0, columns * channels * sizeof(T));
    if (h < 0 || h >= p.H) continue;
    memset(tile, 0, begin * channels * sizeof(T));
    memset(tile + end * channels, 0, (columns - end) * channels * sizeof(T));
    copy_block(tile + begin * channels, {channels, 1}, x + h * p.x.h + (left + begin - p.padding_w) * p.x.w,
               {p.x.w, p.x.c}, end - begin, live);
  }
}

}  // namespace
