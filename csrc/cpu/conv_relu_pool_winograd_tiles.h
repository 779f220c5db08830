// A convolution's plane as tiles of 2x2, for Winograd's F(2x2, 3x3): which tiles lie side by side, and their inputs in
// the domain of the transform.
#pragma once

#include "cpu/conv_relu_pool_tile.h"
#include "cpu/conv_relu_pool_winograd.h"

namespace {

// Tiles: one per pooled output, or covering the convolution where nothing is pooled.
FASTARCH_INLINE bool pooled(const ConvReluPool& p) { return p.pool_h == 2; }
FASTARCH_INLINE int64_t tile_rows(const ConvReluPool& p) { return pooled(p) ? p.PH : ceil_div(p.OH, 2); }
FASTARCH_INLINE int64_t tile_columns(const ConvReluPool& p) { return pooled(p) ? p.PW : ceil_div(p.OW, 2); }
FASTARCH_INLINE int64_t tiles_of(const ConvReluPool& p) { return p.N * tile_rows(p) * tile_columns(p); }

// Tiles [first, first + count) of a block lie side by side: in one row of tiles, or in one image.
struct Segment {
  int64_t n, row, column, first, count;
};
template <class Visit>
void segments(const ConvReluPool& p, int64_t begin, int64_t end, bool across_rows, const Visit& visit) {
  const int64_t columns = tile_columns(p), image = tile_rows(p) * columns, span = across_rows ? image : columns;
  for (int64_t t = begin, count; t < end; t += count) {
    count = least(span - t % span, end - t);
    visit(Segment{t / image, t % image / columns, t % columns, t - begin, count});
  }
}

// Elements of the strip of input under `tiles` neighbouring tiles, for one vector of channels.
template <class T>
constexpr int64_t strip_elements(int64_t tiles) {
  return 4 * (2 * tiles + 2) * LANES<T>;
}

// B' d B of every tile of a segment, of `channels` channels from x on, which points into the image: inputs [slice of
// channels][point][tile][lane], points a `step` apart.
template <class Storage>
void transform_inputs(const ConvReluPool& p, const Segment& s, const Storage* x, int64_t channels,
                      Compute<Storage>* strip, Compute<Storage>* inputs, int64_t step) {
  using T = Compute<Storage>;
  using Domain = Products<T, 3>;
  constexpr int L = LANES<T>;
  const int64_t columns = 2 * s.count + 2;
  for (int64_t c = 0; c < channels; c += L) {
    load_tile<Storage>(p, x + c * p.x.c, 2 * s.row, 2 * s.column, 4, columns, L, least(L, channels - c), strip);
    const T* rows[4];
    for (int i = 0; i < 4; i++) rows[i] = strip + i * columns * L;
    Domain::transform_inputs(rows, L, s.count, inputs + c / L * Domain::POINTS * step + s.first * L, step);
  }
}

}  // namespace
