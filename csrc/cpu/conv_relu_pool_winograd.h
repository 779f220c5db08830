// Winograd's minimal filtering: two neighbouring outputs of a filter with r taps from r + 1 products instead of 2 r,
//
//   y = A' [(G g) . (B' d)],   in two dimensions   Y = A' [(G g G') . (B' d B)] A,
//
// for tiles of 2x2 outputs and 3x3 or 4x4 taps. Lavin and Gray 2016, arXiv 1509.09308, section 4.1; the matrices follow
// from the points 0, 1, -1 and infinity, or 0, -1, 2, 1/2 and infinity (of the sets for four taps that we tried the
// one with the least rounding error: 1.4 times that of a direct sum in the mean square, 2.0 for 0, 1, -1, 2).
#pragma once

#include "cpu/conv_relu_pool_window.h"
#include "cpu/product.h"

namespace {

template <int TAPS>
struct Transform;

template <>
struct Transform<3> {
  template <class V>
  static FASTARCH_INLINE void filter(const V g[3], V t[4]) {  // G g
    const V even = (g[0] + g[2]) / 2, odd = g[1] / 2;
    t[0] = g[0], t[1] = even + odd, t[2] = even - odd, t[3] = g[2];
  }
  template <class V>
  static FASTARCH_INLINE void input(const V d[4], V t[4]) {  // B' d
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  template <class V>
  static FASTARCH_INLINE void output(const V m[4], V y[2]) {  // A' m
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  template <class V>
  static FASTARCH_INLINE void gradient(const V dy[2], V t[4]) {  // A dy
    t[0] = dy[0], t[1] = dy[0] + dy[1], t[2] = dy[0] - dy[1], t[3] = -dy[1];
  }
  template <class V>
  static FASTARCH_INLINE void filter_gradient(const V t[4], V dg[3]) {  // G' t
    const V even = (t[1] + t[2]) / 2;
    dg[0] = t[0] + even, dg[1] = (t[1] - t[2]) / 2, dg[2] = even + t[3];
  }
};

template <>
struct Transform<4> {
  template <class V>
  static FASTARCH_INLINE void filter(const V g[4], V t[5]) {
    const V even = g[0] + g[2], odd = g[1] + g[3];
    t[0] = g[0], t[1] = (odd - even) / 4.5f, t[2] = (g[0] + 2 * g[1] + 4 * g[2] + 8 * g[3]) / 9;
    t[3] = (8 * g[0] + 4 * g[1] + 2 * g[2] + g[3]) / -9, t[4] = g[3];
  }
  template <class V>
  static FASTARCH_INLINE void input(const V d[5], V t[5]) {
    t[0] = d[0] + d[3] - 1.5f * (d[1] + d[2]), t[1] = d[1] + d[3] - 2.5f * d[2], t[2] = d[3] + 0.5f * (d[2] - d[1]);
    t[3] = d[3] - d[2] - 2 * d[1], t[4] = d[1] + d[4] - 1.5f * (d[2] + d[3]);
  }
  template <class V>
  static FASTARCH_INLINE void output(const V m[5], V y[2]) {
    y[0] = m[0] + m[1] + m[2] + m[3], y[1] = 2 * m[2] - m[1] + 0.5f * m[3] + m[4];
  }
};

// The products of a block of tiles in the domain of the transforms, point by point.
template <class T, int TAPS>
struct Products {
  static constexpr int L = LANES<T>;
  static constexpr int SIDE = TAPS + 1, POINTS = SIDE * SIDE;

  // G g G' of up to L filters at once, each times its scale: taps [(r * TAPS + s) * tap][lane] to points [point *
  // step][lane].
  static FASTARCH_INLINE void transform_filter(const T* taps, int64_t tap, Vec<T> scale, T* points, int64_t step) {
    Vec<T> columns[TAPS][SIDE];
    for (int s = 0; s < TAPS; s++) {
      Vec<T> g[TAPS];
      for (int r = 0; r < TAPS; r++) g[r] = load(taps + (r * TAPS + s) * tap) * scale;
      Transform<TAPS>::filter(g, columns[s]);
    }
    for (int i = 0; i < SIDE; i++) {
      Vec<T> row[TAPS], u[SIDE];
      for (int s = 0; s < TAPS; s++) row[s] = columns[s][i];
      Transform<TAPS>::filter(row, u);
      for (int j = 0; j < SIDE; j++) store(points + (i * SIDE + j) * step, u[j]);
    }
  }

  // The adjoint, G' m G: points [point] to taps [r * TAPS + s][lane].
  static FASTARCH_INLINE void transform_filter_gradient(const Vec<T> points[POINTS], T* taps) {
    Vec<T> columns[SIDE][TAPS];
    for (int j = 0; j < SIDE; j++) {
      Vec<T> m[SIDE];
      for (int i = 0; i < SIDE; i++) m[i] = points[i * SIDE + j];
      Transform<TAPS>::filter_gradient(m, columns[j]);
    }
    for (int r = 0; r < TAPS; r++) {
      Vec<T> row[SIDE], dg[TAPS];
      for (int j = 0; j < SIDE; j++) row[j] = columns[j][r];
      Transform<TAPS>::filter_gradient(row, dg);
      for (int s = 0; s < TAPS; s++) store(taps + (r * TAPS + s) * L, dg[s]);
    }
  }

  // B' d B of `tiles` neighbouring tiles for one vector of channels: row i of d stands at rows[i], its columns `column`
  // apart; point p of tile t goes to points + p * step + t * L.
  static FASTARCH_INLINE void transform_inputs(const T* const rows[SIDE], int64_t column, int64_t tiles, T* points,
                                               int64_t step) {
    Vec<T> columns[SIDE][SIDE];  // B' d; all but two are also the next tile's
    const auto transform_column = [&](int64_t j, Vec<T> to[SIDE]) {
      Vec<T> d[SIDE];
      for (int i = 0; i < SIDE; i++) d[i] = load(rows[i] + j * column);
      Transform<TAPS>::input(d, to);
    };
    for (int j = 0; j < SIDE - 2; j++) transform_column(j, columns[j]);
    for (int64_t t = 0; t < tiles; t++, points += L) {
      transform_column(2 * t + SIDE - 2, columns[SIDE - 2]);
      transform_column(2 * t + SIDE - 1, columns[SIDE - 1]);
      for (int i = 0; i < SIDE; i++) {
        Vec<T> row[SIDE], v[SIDE];
        for (int j = 0; j < SIDE; j++) row[j] = columns[j][i];
        Transform<TAPS>::input(row, v);
        for (int j = 0; j < SIDE; j++) store(points + (i * SIDE + j) * step, v[j]);
        for (int j = 0; j < SIDE - 2; j++) columns[j][i] = columns[j + 2][i];
      }
    }
  }

  // The point of A dy A' that is the sum of the tile, where both dimensions' transforms are.
  static constexpr int SUM = SIDE + 1;

  // A dy A' of one tile for one vector of channels: rows of dy are `row` apart; points to points + point * step.
  static FASTARCH_INLINE void transform_gradient(const T* dy, int64_t row, T* points, int64_t step) {
    Vec<T> columns[2][SIDE];
    for (int j = 0; j < 2; j++) {
      const Vec<T> column[2] = {load(dy + j * L), load(dy + row + j * L)};
      Transform<TAPS>::gradient(column, columns[j]);
    }
    for (int i = 0; i < SIDE; i++) {
      const Vec<T> pair[2] = {columns[0][i], columns[1][i]};
      Vec<T> t[SIDE];
      Transform<TAPS>::gradient(pair, t);
      for (int j = 0; j < SIDE; j++) store(points + (i * SIDE + j) * step, t[j]);
    }
  }

  // Products of one tile, [point][V * L]; the spare vector keeps equal points of different tiles out of the same sets
  // of the cache.
  template <int V>
  static constexpr int64_t TILE = (POINTS * V + 1) * L;

  // All products of `tiles` tiles with V vectors of output channels: inputs [slice of channels][point][tile <
  // spread][L], filters [v][point][channel][L], products [tile][TILE<V>]. The filters of all but the first `tall`
  // channels are 0 in the last row of points.
  template <int V>
  static void multiply(const T* inputs, int64_t spread, int64_t tiles, const T* filters, int64_t channels, int64_t tall,
                       T* products) {
    for (int point = 0; point < POINTS; point++) {
      const int64_t live = point < POINTS - SIDE ? channels : tall;
      for (int64_t t = 0, n; t < tiles; t += n) {
        n = balanced_rows(tiles - t);
        block_of<V>(n)(inputs + (point * spread + t) * L, POINTS * spread * L, filters + point * channels * L,
                       POINTS * channels * L, live, products + t * TILE<V> + point * V * L);
      }
    }
  }

  template <int ROWS, int V>
  static void multiply_block(const T* inputs, int64_t slice, const T* filters, int64_t vector, int64_t channels,
                             T* products) {
    Vec<T> acc[ROWS][V] = {};
    for (int64_t c = 0; c < channels; c += L, inputs += slice) {
      multiply_add<ROWS, V, T>(acc, inputs, every(L), filters + c * L, vector, least(L, channels - c));
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) store(products + i * TILE<V> + v * L, acc[i][v]);
    }
  }

  template <int V, int ROWS = PRODUCT_ROWS>
  static auto block_of(int64_t rows) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return block_of<V, ROWS - 1>(rows);
    }
    return &multiply_block<ROWS, V>;
  }

  // The 2x2 outputs of one tile and one of its V vectors of channels: A' m A + b.
  template <int V>
  static FASTARCH_INLINE void transform_products(const T* products, Vec<T> b, Vec<T> (&conv)[2][2]) {
    Vec<T> columns[SIDE][2];  // A' m
    for (int j = 0; j < SIDE; j++) {
      Vec<T> m[SIDE];
      for (int i = 0; i < SIDE; i++) m[i] = load(products + (i * SIDE + j) * V * L);
      Transform<TAPS>::output(m, columns[j]);
    }
    for (int i = 0; i < 2; i++) {
      Vec<T> row[SIDE];
      for (int j = 0; j < SIDE; j++) row[j] = columns[j][i];
      Transform<TAPS>::output(row, conv[i]);
      conv[i][0] += b, conv[i][1] += b;
    }
  }
};

}  // namespace
