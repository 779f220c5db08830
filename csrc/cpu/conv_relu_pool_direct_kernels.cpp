// conv_relu_pool, directly: conv[i, j, k] = b[k] + sum_{r, s, c} x[i, j; r, s, c] w[r, s, c; k], pooled before it
// leaves.
//
// A task is a band of pooled rows of one image. Its input lies in a padded tile, of which blocks of positions x
// channels read broadcasts and accumulate in registers; rows of the convolution go through the pool's ring.
#include "cpu/conv_relu_pool_tile.h"
#include "cpu/conv_relu_pool_window.h"
#include "cpu/product.h"

namespace {

constexpr int64_t TILE_BYTES = 768 << 10;  // of input in one band: most of a 1 MB second-level cache
constexpr int64_t PART_TERMS = 512;        // of a sum that are added up in one chain
constexpr int64_t LONG_RUN = 7;  // taps (s) from which planes are faster: at 5 they took 15 % more, at 7 5 % less

template <class Storage>
struct Direct {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;

  // How the input lies in a tile, [row][c][column] or [row][column][c] as in memory, and the filter's walk over it: for
  // `outer` rows and `inner` runs in each, `length` elements side by side.
  struct Layout {
    int64_t row, column, channel;  // steps
    int64_t outer, outer_step, inner, inner_step, length;
    int64_t tap, tap_row, tap_channel;  // where (r, s, c) comes in that order

    explicit Layout(const ConvReluPool& p) {
      const int64_t columns = columns_under(p, p.OW);
      row = columns * p.C, outer = p.R, outer_step = p.dilation_h * row;
      if (p.x.c != 1 && p.dilation_w == 1 && p.S >= LONG_RUN) {  // planes: runs (s) for each (r, c)
        column = 1, channel = columns;
        inner = p.C, inner_step = columns, length = p.S;
        tap_row = p.C * p.S, tap_channel = p.S, tap = 1;
      } else {  // interleaved: runs (s, c) for each r, or (c) for each (r, s) of a dilated filter
        column = p.C, channel = 1;
        inner = p.dilation_w == 1 ? 1 : p.S, inner_step = p.dilation_w * p.C,
        length = p.dilation_w == 1 ? p.S * p.C : p.C;
        tap_row = p.S * p.C, tap_channel = 1, tap = p.C;
      }
    }
  };

  // Packed: per group, filters [vector of channels k][r, s, c in the walk's order][lane], then the bias [vector][lane].
  static int64_t taps(const ConvReluPool& p) { return p.R * p.S * p.C; }
  static int64_t vectors(const ConvReluPool& p) { return ceil_div(p.K, L); }
  static int64_t group_elements(const ConvReluPool& p) { return vectors(p) * L * (taps(p) + 1); }
  static int64_t packed_bytes(const ConvReluPool& p) { return p.G * group_elements(p) * sizeof(T); }
  static int64_t pack_tasks(const ConvReluPool& p) { return p.G * vectors(p); }

  static void pack(const ConvReluPool& p, const void* weight, const void* bias, void* packed, int64_t task) {
    const Layout layout(p);
    const int64_t group = task / vectors(p), vector = task % vectors(p), k0 = vector * L, live = least(L, p.K - k0);
    T* filters = static_cast<T*>(packed) + group * group_elements(p);
    const Storage* from = static_cast<const Storage*>(weight) + (group * p.K + k0) * taps(p);  // [k][c][r][s]
    T* to = filters + k0 * taps(p);
    if (live < L) memset(to, 0, taps(p) * L * sizeof(T));
    for (int64_t c = 0; c < p.C; c++) {
      for (int64_t r = 0; r < p.R; r++) {
        copy_block(to + (r * layout.tap_row + c * layout.tap_channel) * L, {layout.tap * L, 1},
                   from + (c * p.R + r) * p.S, {1, taps(p)}, p.S, live);
      }
    }
    T* b = filters + vectors(p) * L * taps(p) + k0;
    for (int64_t k = 0; k < L; k++) {
      b[k] =
          bias && k < live ? Convert<T, Storage>::from(static_cast<const Storage*>(bias)[group * p.K + k0 + k]) : T(0);
    }
  }

  static int64_t tile_rows(const ConvReluPool& p, int64_t pooled_rows) {
    return rows_under(p, least(p.OH, (pooled_rows - 1) * p.pool_stride_h + p.pool_h));
  }
  // Pooled rows of one task: as many as the tile holds, fewer if that leaves threads without work.
  static int64_t band(const ConvReluPool& p) {
    const int64_t row_bytes = columns_under(p, p.OW) * p.C * sizeof(T);
    int64_t bands = ceil_div(2 * p.threads, p.N * p.G);
    while (bands < p.PH && tile_rows(p, ceil_div(p.PH, bands)) * row_bytes > TILE_BYTES) bands++;
    return ceil_div(p.PH, least(bands, p.PH));
  }
  static int64_t bands(const ConvReluPool& p) { return ceil_div(p.PH, band(p)); }
  static int64_t tasks(const ConvReluPool& p) { return p.N * p.G * bands(p); }
  static int64_t tile_elements(const ConvReluPool& p) {
    return ceil_div(tile_rows(p, band(p)) * columns_under(p, p.OW) * p.C, L) * L;
  }
  static int64_t scratch_bytes(const ConvReluPool& p) {
    return (tile_elements(p) + pool_rows_scratch<1, T>(p, 2 * L)) * sizeof(T);
  }

  // ROWS positions of one row of the convolution, V vectors of channels: out [ROWS][V * L]. Long sums are taken in
  // parts, because a chain of thousands of terms loses digits that a library, which takes parts as well, keeps.
  template <int ROWS, int V>
  static void convolve_block(const Layout& layout, const T* tile, int64_t step, const T* w, int64_t w_step,
                             const T* bias, T* out) {
    const int64_t part = most(1, PART_TERMS / (layout.inner * layout.length));
    for (int64_t begin = 0; begin < layout.outer; begin += part) {
      Vec<T> acc[ROWS][V];
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) acc[i][v] = begin == 0 ? load(bias + v * L) : Vec<T>{};
      }
      for (int64_t i = begin; i < least(begin + part, layout.outer); i++) {
        for (int64_t j = 0; j < layout.inner; j++) {
          const T* run = tile + i * layout.outer_step + j * layout.inner_step;
          multiply_add<ROWS, V, T>(acc, run, step, w, w_step, layout.length);
          w += layout.length * L;
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          T* to = out + (i * V + v) * L;
          store(to, begin == 0 ? acc[i][v] : load(to) + acc[i][v]);
        }
      }
    }
  }

  template <int V, int ROWS = PRODUCT_ROWS>
  static auto block_of(int64_t rows) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return block_of<V, ROWS - 1>(rows);
    }
    return &convolve_block<ROWS, V>;
  }

  template <int V, class Pool>
  static void run_vectors(const ConvReluPool& p, const Layout& layout, int64_t begin, int64_t end, const T* tile,
                          int64_t top, const T* w, const T* bias, int64_t live, T* scratch, Storage* y,
                          uint8_t* index) {
    const int64_t step = p.stride_w * layout.column;
    const auto convolve = [&](int64_t row, const Ring<T>& ring) {
      const T* from = tile + (row * p.stride_h - top) * layout.row;
      for (int64_t i = 0, n; i < p.OW; i += n) {
        n = balanced_rows(p.OW - i);
        block_of<V>(n)(layout, from + i * step, step, w, taps(p) * L, bias, ring[row] + i * V * L);
      }
    };
    pool_rows<1, Pool>(p, begin, end, V * L, live, convolve, scratch, y, index);
  }

  static void run(const ConvReluPool& p, const void* x, const void* packed, void* y, uint8_t* index, int64_t task,
                  void* scratch) {
    const Layout layout(p);
    const int64_t n = task / (p.G * bands(p)), group = task / bands(p) % p.G, begin = task % bands(p) * band(p);
    const int64_t end = least(begin + band(p), p.PH);
    const int64_t top = window_h(p, begin).begin * p.stride_h;
    const int64_t rows = rows_under(p, window_h(p, end - 1).end - window_h(p, begin).begin);
    const int64_t columns = columns_under(p, p.OW);
    T* tile = static_cast<T*>(scratch);
    const Storage* image = static_cast<const Storage*>(x) + n * p.x.n + group * p.C * p.x.c;
    if (layout.channel == 1) {
      load_tile<Storage>(p, image, top, 0, rows, columns, p.C, p.C, tile);
    } else {
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t c = 0; c < p.C; c++) {
          load_tile<Storage>(p, image + c * p.x.c, top + row, 0, 1, columns, 1, 1, tile + (row * p.C + c) * columns);
        }
      }
    }

    const T* filters = static_cast<const T*>(packed) + group * group_elements(p);
    const T* bias = filters + vectors(p) * L * taps(p);
    for (int64_t k = 0; k < p.K; k += 2 * L) {
      const int64_t live = least(2 * L, p.K - k), channel = group * p.K + k;
      Storage* to = static_cast<Storage*>(y) + n * p.y.n + channel * p.y.c;
      uint8_t* at = index ? index + n * p.index.n + channel * p.index.c : nullptr;
      with_pool<T>(p.average, index, [&](auto pool) {
        (live > L ? run_vectors<2, decltype(pool)>
                  : run_vectors<1, decltype(pool)>)(p, layout, begin, end, tile, top, filters + k * taps(p), bias + k,
                                                    live, tile + tile_elements(p), to, at);
      });
    }
  }

  static constexpr ConvReluPoolFwd table = {packed_bytes, pack_tasks, pack, scratch_bytes, tasks, run};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolFwds, conv_relu_pool_direct) = {
    {Direct<float>::table, Direct<double>::table, Direct<BFloat16>::table, Direct<Float16>::table}};
