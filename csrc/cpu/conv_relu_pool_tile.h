// Channels-last, zero-padded tiles of the input in the type that kernels compute in, and filters laid over them.
#pragma once

#include "cpu/conv_relu_pool.h"
#include "cpu/layout.h"
#include "cpu/range.h"

namespace {

// A filter's elements (r, s, c) over a tile, as runs that are contiguous in it: rows (s, c), or taps (c) where the
// filter is dilated along its rows or a caller wants short runs.
struct Runs {
  bool rows;
  int64_t count, length;

  FASTARCH_INLINE Runs(const ConvReluPool& p, int64_t channels, bool rows)
      : rows(rows), count(rows ? p.R : p.R * p.S), length(rows ? p.S * channels : channels) {}

  // Where run i starts, relative to the filter's first element, in a tile whose rows are `row` elements long.
  FASTARCH_INLINE int64_t offset(const ConvReluPool& p, int64_t i, int64_t row, int64_t channels) const {
    if (rows) return i * p.dilation_h * row;
    return i / p.S * p.dilation_h * row + i % p.S * p.dilation_w * channels;
  }
};

// Input rows or columns under `n` neighbouring rows or columns of the convolution.
FASTARCH_INLINE int64_t rows_under(const ConvReluPool& p, int64_t n) {
  return (n - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
}
FASTARCH_INLINE int64_t columns_under(const ConvReluPool& p, int64_t n) {
  return (n - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
}

// tile[i][j][c] = x[c][top + i - padding_h][left + j - padding_w], or 0 outside, for i < rows, j < columns, c <
// channels; channels [live, channels) are 0. x points to the first of the channels in the image.
template <class Storage>
void load_tile(const ConvReluPool& p, const Storage* x, int64_t top, int64_t left, int64_t rows, int64_t columns,
               int64_t channels, int64_t live, Compute<Storage>* tile) {
  using T = Compute<Storage>;
  int64_t begin = p.padding_w - left, end = p.W + p.padding_w - left;  // the columns that x has
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

// The same of whole rows with all channels, as planes: tile[i][c][j] = x[c][top + i - padding_h][j - padding_w].
template <class Storage>
void load_planes(const ConvReluPool& p, const Storage* x, int64_t top, int64_t rows, int64_t columns,
                 Compute<Storage>* tile) {
  const int64_t begin = least(p.padding_w, columns), end = most(begin, least(p.W + p.padding_w, columns));
  for (int64_t i = 0; i < rows; i++) {
    const int64_t h = top + i - p.padding_h;
    const bool inside = h >= 0 && h < p.H;
    for (int64_t c = 0; c < p.C; c++, tile += columns) {
      for (int64_t j = 0; j < (inside ? begin : columns); j++) tile[j] = 0;
      if (!inside) continue;
      const Storage* from = x + c * p.x.c + h * p.x.h;
      if (p.x.w == 1) {
        copy_row(tile + begin, from, end - begin);  // inlined: rows are short
      } else {
        copy_block(tile + begin, {columns, 1}, from, {p.x.h, p.x.w}, 1, end - begin);
      }
      for (int64_t j = end; j < columns; j++) tile[j] = 0;
    }
  }
}

// What belongs to `live` output channels as a vector: from[k] in each of the `copies` lanes of channel k, elsewhere and
// where there is no `from` the neutral element.
template <class T, class From>
FASTARCH_INLINE void load_channels(const From* from, int64_t live, T neutral, T* to, int64_t copies = 1) {
  for (int64_t lane = 0; lane < LANES<T>; lane++) {
    const int64_t k = lane / copies;
    to[lane] = from && k < live ? Convert<T, From>::from(from[k]) : neutral;
  }
}

// The inverse, for a gradient: row `top + i - padding_h` of dx from row i of the tile, 0 where the tile does not reach.
template <class Storage>
void store_row(const ConvReluPool& p, const Compute<Storage>* row, int64_t left, int64_t columns, int64_t channels,
               int64_t live, Storage* dx) {
  const int64_t begin = p.padding_w - left;  // the tile's column of dx's first
  const int64_t covered = columns - begin < p.W ? (columns - begin < 0 ? 0 : columns - begin) : p.W;
  copy_block(dx, {p.x.w, p.x.c}, row + begin * channels, {channels, 1}, covered, live);
  for (int64_t w = covered; w < p.W; w++) {
    for (int64_t c = 0; c < live; c++) dx[w * p.x.w + c * p.x.c] = Convert<Storage, Compute<Storage>>::from(0);
  }
}

}  // namespace
