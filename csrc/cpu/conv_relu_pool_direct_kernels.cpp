// conv_relu_pool, directly: conv[i, j, k] = b[k] + sum_{r, s, c} x[i, j; r, s, c] w[r, s, c; k], pooled before it
// leaves.
//
// A task is a band of pooled rows of one image, or of two. Its input lies in a padded tile, of which blocks of
// positions x channels read broadcasts and accumulate in registers. Windows of 2x2 are pooled there; others from rows
// of the convolution in the pool's ring.
#include "cpu/conv_relu_pool_tile.h"
#include "cpu/conv_relu_pool_window.h"
#include "cpu/product.h"

namespace {

constexpr int64_t TILE_BYTES = 768 << 10;  // of input in one band: most of a 1 MB second-level cache
constexpr int64_t PART_TERMS = 512;        // of a sum that are added up in one chain
// Positions of a block of V vectors. One vector leaves registers for 12, and with fewer than 8 sums wait for
// themselves: lenet_c1 763 -> 631 us on one core with AVX2.
template <int V>
constexpr int BLOCK_ROWS = V == 1 ? 12 : PRODUCT_ROWS;
// Taps (s) from which planes are faster: at 5 they took 15 % more, at 7 5 % less; where blocks know the 5 2 % less.
constexpr int64_t LONG_RUN = 7, KNOWN_RUN = 5;

template <class Storage>
struct Direct {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;

  // Images that share their vectors: two where the output channels fill at most half of one (lenet_c1 342 -> 190 us on
  // one core). A tile then holds pairs of their elements, and a vector the channels of both by turns.
  static int64_t images(const ConvReluPool& p) { return sizeof(T) == sizeof(float) && 2 * p.K <= L && p.N > 1 ? 2 : 1; }

  // How the input lies in a tile, [row][c][column] or [row][column][c] as in memory, and the filter's walk over it: for
  // `outer` rows and `inner` runs in each, `length` elements side by side.
  struct Layout {
    int64_t row, column, channel;  // steps
    int64_t outer, outer_step, inner, inner_step, length;
    int64_t tap, tap_row, tap_channel;  // where (r, s, c) comes in that order

    explicit Layout(const ConvReluPool& p) {
      const int64_t columns = columns_under(p, p.OW);
      if (reads_in_place(p)) {
        row = p.x.h, column = p.x.w, channel = tap_channel = 1;
        outer = inner = 1, outer_step = inner_step = tap_row = tap = 0, length = p.C;
        return;
      }
      row = columns * p.C, outer = p.R, outer_step = p.dilation_h * row;
      const bool long_run = p.S >= LONG_RUN || (p.S == KNOWN_RUN && pools_in_registers(p));
      if (p.x.c != 1 && p.dilation_w == 1 && long_run) {  // planes: runs (s) for each (r, c)
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

  // Whether memory already has the tile: under filters of one tap and no padding, with channels side by side.
  static bool reads_in_place(const ConvReluPool& p) {
    return sizeof(Storage) == sizeof(T) && p.R * p.S == 1 && p.padding_h == 0 && p.padding_w == 0 && p.x.c == 1 &&
           images(p) == 1;
  }

  // Packed: per group, filters [vector of channels k][r, s, c in the walk's order][lane], then the bias [vector][lane].
  static int64_t taps(const ConvReluPool& p) { return p.R * p.S * p.C; }
  static int64_t vectors(const ConvReluPool& p) { return ceil_div(p.K, L); }
  static int64_t group_elements(const ConvReluPool& p) { return vectors(p) * L * (taps(p) + 1); }
  static int64_t packed_bytes(const ConvReluPool& p) { return p.G * group_elements(p) * sizeof(T); }
  static int64_t pack_tasks(const ConvReluPool& p) { return p.G * vectors(p); }

  static void pack(const ConvReluPool& p, const void* weight, const void* scale, const void* bias, void* packed,
                   int64_t task) {
    const Layout layout(p);
    const int64_t group = task / vectors(p), vector = task % vectors(p), k0 = vector * L, live = least(L, p.K - k0);
    T* filters = static_cast<T*>(packed) + group * group_elements(p);
    const Storage* from = static_cast<const Storage*>(weight) + (group * p.K + k0) * p.w.k;
    T* to = filters + k0 * taps(p);
    const int64_t channel = group * p.K + k0;
    T factors[L];
    load_channels(scale ? static_cast<const T*>(scale) + channel : nullptr, live, T(1), factors, images(p));
    load_channels(bias ? static_cast<const Storage*>(bias) + channel : nullptr, live, T(0),
                  filters + vectors(p) * L * taps(p) + k0, images(p));
    // A run of each filter's terms, transposed, then one by one to where the walk meets it. Packed tap by tap, a 1x1
    // convolution of 2048 channels to 512 over 49 places took 2.8 ms instead of 2.1.
    constexpr int64_t RUN = 4 * L;
    T run[RUN * L] = {};
    const bool by_taps = p.w.tap == 1;  // lie side by side, else channels do
    int64_t r = 0, s = 0, c = 0;
    for (int64_t begin = 0; begin < taps(p); begin += RUN) {
      const int64_t n = least(RUN, taps(p) - begin);
      for (int64_t image = 0; image < images(p); image++)
        copy_block(run + image, {L, images(p)}, from + begin, {1, p.w.k}, n, live);
      for (int64_t i = 0; i < n; i++) {
        store(to + (r * layout.tap_row + s * layout.tap + c * layout.tap_channel) * L,
              load(run + i * L) * load(factors));
        if (!by_taps && ++c < p.C) continue;
        if (!by_taps) c = 0;
        if (++s < p.S) continue;
        s = 0;
        if (++r == p.R) r = 0, c++;
      }
    }
  }

  static int64_t tile_rows(const ConvReluPool& p, int64_t pooled_rows) {
    return rows_under(p, least(p.OH, (pooled_rows - 1) * p.pool_stride_h + p.pool_h));
  }
  // Pooled rows of one task: as many as the tile holds, fewer if that leaves threads without work.
  static int64_t band(const ConvReluPool& p) {
    const int64_t row_bytes = images(p) * columns_under(p, p.OW) * p.C * sizeof(T);
    int64_t bands = ceil_div(2 * p.threads, image_tasks(p));
    while (bands < p.PH && tile_rows(p, ceil_div(p.PH, bands)) * row_bytes > TILE_BYTES) bands++;
    return ceil_div(p.PH, least(bands, p.PH));
  }
  static int64_t bands(const ConvReluPool& p) { return ceil_div(p.PH, band(p)); }
  static int64_t image_tasks(const ConvReluPool& p) { return ceil_div(p.N, images(p)) * p.G; }
  static int64_t tasks(const ConvReluPool& p) { return image_tasks(p) * bands(p); }
  static int64_t tile_elements(const ConvReluPool& p) {
    if (reads_in_place(p)) return 0;
    return ceil_div(tile_rows(p, band(p)) * columns_under(p, p.OW) * p.C, L) * L;
  }
  static int64_t scratch_bytes(const ConvReluPool& p) {
    const int64_t tiles = images(p) == 1 ? 1 : 4;  // two, and both as pairs
    return (tiles * tile_elements(p) + pool_rows_scratch<1, T>(p, 2 * L)) * sizeof(T);
  }

  // Where a block goes: [position][V * L], positions a step apart; with ReLU, and a residual laid out alike or nullptr.
  struct Out {
    T* at;
    int64_t step;
    bool relu;
    const T* r;
  };

  // ROWS positions of one row of the convolution, V vectors of channels. Long sums are taken in parts, because a chain
  // of thousands of terms loses digits that a library, which takes parts as well, keeps.
  template <int ROWS, int V, class X>
  static void convolve_block(const Layout& layout, const X* tile, int64_t step, const T* w, int64_t w_step,
                             const T* bias, const Out& out) {
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
          const X* run = tile + i * layout.outer_step + j * layout.inner_step;
          multiply_add<ROWS, V, T>(acc, run, every(step), w, w_step, layout.length);
          w += layout.length * L;
        }
      }
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          const int64_t to = i * out.step + v * L;
          if constexpr (sizeof(X) != sizeof(T)) acc[i][v] = deinterleave<T>(acc[i][v]);
          Vec<T> sum = begin == 0 ? acc[i][v] : load(out.at + to) + acc[i][v];
          if (begin + part >= layout.outer) {
            if (out.r) sum += load(out.r + to);
            if (out.relu) sum = (sum > Vec<T>{}) | (sum != sum) ? sum : Vec<T>{};
          }
          store(out.at + to, sum);
        }
      }
    }
  }

  template <int V, class X, int ROWS = BLOCK_ROWS<V>>
  static auto block_of(int64_t rows) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return block_of<V, X, ROWS - 1>(rows);
    }
    return &convolve_block<ROWS, V, X>;
  }

  // Whether windows of 2 x 2 can be pooled in the registers in which they are summed up: notes_conv1 288 -> 222 us,
  // lenet_c1 190 -> 167 us on one core.
  static bool pools_in_registers(const ConvReluPool& p) {
    return p.pool_h == 2 && p.pool_w == 2 && p.pool_stride_h == 2 && p.pool_stride_w == 2 && p.pool_padding_h == 0 &&
           p.pool_padding_w == 0 && 2 * p.PH <= p.OH && 2 * p.PW <= p.OW && taps(p) <= PART_TERMS;
  }

  // COLUMNS pooled columns of one row: value [COLUMNS] with the given step, at [COLUMNS][V * L]. Runs of LENGTH taps,
  // or of any number if that is 0: those of one channel know theirs, as otherwise the end of each costs 10 %
  // (notes_conv1 438 -> 383 us, lenet_c1 292 -> 247 us on one core of a Zen 4).
  template <class Pool, int V, class X, int LENGTH, int COLUMNS>
  static void pool_block(const Layout& layout, const X* tile, int64_t row, int64_t column, const T* w, int64_t w_step,
                         const T* bias, T* value, int64_t step, IntOf<T>* at) {
    Vec<T> acc[4 * COLUMNS][V];
#pragma GCC unroll 12
    for (int i = 0; i < 4 * COLUMNS; i++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[i][v] = load(bias + v * L);
    }
    const X* places[4 * COLUMNS];  // of the convolution
#pragma GCC unroll 12
    for (int i = 0; i < 4 * COLUMNS; i++) places[i] = tile + i / 2 % 2 * row + (i / 4 * 2 + i % 2) * column;
    for (int64_t i = 0; i < layout.outer; i++) {
      int64_t run = i * layout.outer_step;
      for (int64_t j = 0; j < layout.inner; j++, run += layout.inner_step) {
        const int64_t length = LENGTH ? LENGTH : layout.length;
        for (int64_t t = 0; t < length; t++) {
          Vec<T> factor[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) factor[v] = load(w + v * w_step + t * L);
#pragma GCC unroll 12
          for (int p = 0; p < 4 * COLUMNS; p++) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[p][v] += factor[v] * broadcast(places[p][run + t]);
          }
        }
        w += length * L;
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < COLUMNS; i++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        Pool pool;
#pragma GCC unroll 4
        for (int element = 0; element < 4; element++) pool.take(acc[4 * i + element][v], element);
        pool.finish(4);
        if constexpr (sizeof(X) != sizeof(T)) {
          pool.value = deinterleave<T>(pool.value), pool.index = deinterleave<IntOf<T>>(pool.index);
        }
        store(value + i * step + v * L, pool.value);
        if (at) store(at + (i * V + v) * L, pool.index);
      }
    }
  }

  template <class Pool, int V, class X, int COLUMNS = BLOCK_ROWS<V> / 4>
  static auto pool_block_of(int64_t columns, int64_t length) {
    if constexpr (COLUMNS > 1) {
      if (columns < COLUMNS) return pool_block_of<Pool, V, X, COLUMNS - 1>(columns, length);
    }
    if (length == 3) return &pool_block<Pool, V, X, 3, COLUMNS>;
    if (length == KNOWN_RUN) return &pool_block<Pool, V, X, KNOWN_RUN, COLUMNS>;
    return &pool_block<Pool, V, X, 0, COLUMNS>;
  }

  // The tile's elements are of T, or Pairs of it from two images.
  template <int V, class Pool, class X>
  static void run_vectors(const ConvReluPool& p, const Layout& layout, int64_t begin, int64_t end, const X* tile,
                          int64_t top, const T* w, const T* bias, int64_t live, int64_t images, T* scratch,
                          const Storage* r, Storage* y, uint8_t* index) {
    const int64_t step = p.stride_w * layout.column;
    if (pools_in_registers(p)) {
      const auto pool_row = [&](int64_t row, T* value, int64_t value_step, IntOf<T>* at) {
        const X* from = tile + (2 * row * p.stride_h - top) * layout.row;
        for (int64_t i = 0, n; i < p.PW; i += n) {
          n = balanced_rows(p.PW - i, BLOCK_ROWS<V> / 4);
          pool_block_of<Pool, V, X>(n, layout.length)(layout, from + 2 * i * step, p.stride_h * layout.row, step, w,
                                                      taps(p) * L, bias, value + i * value_step, value_step,
                                                      at ? at + i * V * L : nullptr);
        }
      };
      return write_rows(p, begin, end, V * L, live, pool_row, scratch, AsItIs{}, y, index, images, L / 2);
    }
    if (p.pool_h == 1 && p.pool_w == 1 && p.PH == p.OH && p.PW == p.OW && !p.average && !index) {  // nothing to pool
      // whole vectors of a channels-last output go there from the registers
      if (sizeof(Storage) == sizeof(T) && sizeof(X) == sizeof(T) && p.y.c == 1 && live == V * L) {
        for (int64_t row = begin; row < end; row++) {
          const X* from = tile + (row * p.stride_h - top) * layout.row;
          for (int64_t i = 0, n; i < p.OW; i += n) {
            n = balanced_rows(p.OW - i, BLOCK_ROWS<V>);
            const int64_t to = row * p.y.h + i * p.y.w;
            block_of<V, X>(n)(
                layout, from + i * step, step, w, taps(p) * L, bias,
                {reinterpret_cast<T*>(y + to), p.y.w, p.relu, r ? reinterpret_cast<const T*>(r + to) : nullptr});
          }
        }
        return;
      }
      const auto convolve_row = [&](int64_t row, T* value, int64_t, IntOf<T>*) {
        const X* from = tile + (row * p.stride_h - top) * layout.row;
        for (int64_t i = 0, n; i < p.OW; i += n) {
          n = balanced_rows(p.OW - i, BLOCK_ROWS<V>);
          block_of<V, X>(n)(layout, from + i * step, step, w, taps(p) * L, bias,
                            {value + i * V * L, V * L, false, nullptr});
        }
      };
      const Rectified<Storage, T> rectified{y, r, p.relu};
      return write_rows(p, begin, end, V * L, live, convolve_row, scratch, rectified, y, index, images, L / 2);
    }
    const auto convolve = [&](int64_t row, const Ring<T>& ring) {
      const X* from = tile + (row * p.stride_h - top) * layout.row;
      for (int64_t i = 0, n; i < p.OW; i += n) {
        n = balanced_rows(p.OW - i, BLOCK_ROWS<V>);
        block_of<V, X>(n)(layout, from + i * step, step, w, taps(p) * L, bias,
                          {ring[row] + i * V * L, V * L, false, nullptr});
      }
    };
    pool_rows<1, Pool>(p, begin, end, V * L, live, convolve, scratch, r, y, index, images, L / 2);
  }

  static void pair(const T* a, const T* b, int64_t n, T* pairs) {
    for (int64_t i = 0; i < n; i += L) {
      store(pairs + 2 * i, interleave<0, T>(load(a + i), load(b + i)));
      store(pairs + 2 * i + L, interleave<1, T>(load(a + i), load(b + i)));
    }
  }

  static void fill(const ConvReluPool& p, const Layout& layout, const Storage* image, int64_t top, int64_t rows,
                   T* tile) {
    const int64_t columns = columns_under(p, p.OW);
    if (layout.channel == 1) return load_tile<Storage>(p, image, top, 0, rows, columns, p.C, p.C, tile);
    load_planes(p, image, top, rows, columns, tile);
  }

  static void run(const ConvReluPool& p, const void* x, const void* packed, const void* r, void* y, uint8_t* index,
                  int64_t task, void* scratch) {
    const Layout layout(p);
    const int64_t n = task / (p.G * bands(p)) * images(p), group = task / bands(p) % p.G;
    const int64_t begin = task % bands(p) * band(p), end = least(begin + band(p), p.PH);
    const int64_t top = window_h(p, begin).begin * p.stride_h;
    const int64_t rows = rows_under(p, window_h(p, end - 1).end - window_h(p, begin).begin);
    const int64_t live_images = least(images(p), p.N - n), elements = tile_elements(p);
    T* const loaded = static_cast<T*>(scratch);
    const T* tile = loaded;
    T* rest = loaded + elements;
    const Storage* image = static_cast<const Storage*>(x) + n * p.x.n + group * p.C * p.x.c;
    if (reads_in_place(p)) {
      tile = reinterpret_cast<const T*>(image + top * p.x.h);
    } else {
      fill(p, layout, image, top, rows, loaded);
    }
    if (images(p) == 2) {
      fill(p, layout, image + (live_images - 1) * p.x.n, top, rows, rest);  // of an odd number the last twice
      pair(loaded, rest, elements, rest + elements);
      tile = rest + elements, rest += 3 * elements;
    }

    const T* filters = static_cast<const T*>(packed) + group * group_elements(p);
    const T* bias = filters + vectors(p) * L * taps(p);
    for (int64_t k = 0; k < p.K; k += 2 * L) {
      const int64_t live = least(2 * L, p.K - k), channel = group * p.K + k;
      const Storage* added = r ? static_cast<const Storage*>(r) + n * p.y.n + channel * p.y.c : nullptr;
      Storage* to = static_cast<Storage*>(y) + n * p.y.n + channel * p.y.c;
      uint8_t* at = index ? index + n * p.index.n + channel * p.index.c : nullptr;
      const auto run_on = [&](auto run_vectors, const auto* elements) {
        run_vectors(p, layout, begin, end, elements, top, filters + k * taps(p), bias + k, live, live_images, rest,
                    added, to, at);
      };
      with_pool<T>(p, index, [&](auto pool) {
        using Pool = decltype(pool);
        if constexpr (sizeof(T) == sizeof(float)) {
          if (images(p) == 2) return run_on(run_vectors<1, Pool, Pair>, reinterpret_cast<const Pair*>(tile));
        }
        run_on(live > L ? run_vectors<2, Pool, T> : run_vectors<1, Pool, T>, tile);
      });
    }
  }

  static constexpr ConvReluPoolFwd table = {packed_bytes, pack_tasks, pack, scratch_bytes, tasks, run};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolFwds, conv_relu_pool_direct) = {
    {Direct<float>::table, Direct<double>::table, Direct<BFloat16>::table, Direct<Float16>::table}};
