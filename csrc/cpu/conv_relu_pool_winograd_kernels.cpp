// conv_relu_pool of 3x3 filters by Winograd's F(2x2, 3x3): a tile of 4x4 inputs gives with 16 products instead of 36
// the 2x2 convolutions that are just one window of a 2x2 pool.
//
// A task is a block of tiles, across rows and images: its inputs are transformed once, then for every block of output
// channels the products over the input channels run in registers and are transformed, pooled and written from the
// cache.
#include "cpu/conv_relu_pool_window.h"
#include "cpu/conv_relu_pool_winograd_tiles.h"

namespace {

constexpr int64_t INPUTS_BYTES = 512 << 10;  // of transformed inputs in one task: half of a 1 MB second-level cache

template <class Storage>
struct Winograd {
  using T = Compute<Storage>;
  using Domain = Products<T, 3>;
  static constexpr int L = LANES<T>, POINTS = Domain::POINTS;

  // Packed: per group, filters [vector of channels k][point][c][lane], then the bias [vector of channels][lane].
  static int64_t vectors(const ConvReluPool& p) { return ceil_div(p.K, L); }
  static int64_t filter_elements(const ConvReluPool& p) { return vectors(p) * POINTS * p.C * L; }
  static int64_t group_elements(const ConvReluPool& p) { return filter_elements(p) + vectors(p) * L; }
  static int64_t packed_bytes(const ConvReluPool& p) { return p.G * group_elements(p) * sizeof(T); }
  static int64_t pack_tasks(const ConvReluPool& p) { return p.G * vectors(p); }

  static void pack(const ConvReluPool& p, const void* weight, const void* scale, const void* bias, void* packed,
                   int64_t task) {
    const int64_t group = task / vectors(p), vector = task % vectors(p), k0 = vector * L, live = least(L, p.K - k0);
    T* group_start = static_cast<T*>(packed) + group * group_elements(p);
    const Storage* from = static_cast<const Storage*>(weight) + (group * p.K + k0) * p.w.k;
    T* to = group_start + vector * POINTS * p.C * L;
    const int64_t channel = group * p.K + k0;
    T factors[L];
    load_channels(scale ? static_cast<const T*>(scale) + channel : nullptr, live, T(1), factors);
    constexpr int64_t CHUNK = 16;
    T taps[CHUNK * 9 * L] = {};  // [c][3][3][lane]
    for (int64_t c0 = 0; c0 < p.C; c0 += CHUNK) {
      const int64_t channels = least(CHUNK, p.C - c0);
      const Storage* chunk = from + c0 * p.w.c;
      if (p.w.tap == 1 && p.w.c == 9) {
        copy_block(taps, {L, 1}, chunk, {1, p.w.k}, channels * 9, live);
      } else if (p.w.tap == 1) {
        for (int64_t c = 0; c < channels; c++)
          copy_block(taps + c * 9 * L, {L, 1}, chunk + c * p.w.c, {1, p.w.k}, 9, live);
      } else {
        for (int64_t tap = 0; tap < 9; tap++)
          copy_block(taps + tap * L, {9 * L, 1}, chunk + tap * p.w.tap, {p.w.c, p.w.k}, channels, live);
      }
      for (int64_t c = 0; c < channels; c++) {
        const T* first = taps + (c * 9 + (p.turned ? 8 : 0)) * L;
        Domain::transform_filter(first, p.turned ? -L : L, load(factors), to + (c0 + c) * L, p.C * L);
      }
    }
    load_channels(bias ? static_cast<const Storage*>(bias) + channel : nullptr, live, T(0),
                  group_start + filter_elements(p) + k0);
  }

  static int64_t slices(const ConvReluPool& p) { return ceil_div(p.C, L); }  // vectors of input channels

  // Tiles of one task.
  static int64_t block(const ConvReluPool& p) {
    const int64_t fitting = INPUTS_BYTES / (POINTS * slices(p) * L * int64_t(sizeof(T)));
    const int64_t shared = ceil_div(tiles_of(p) * p.G, 2 * p.threads);
    return PRODUCT_ROWS * most(1, least(least(fitting, shared), 4 * PRODUCT_ROWS) / PRODUCT_ROWS);
  }
  static int64_t blocks(const ConvReluPool& p) { return ceil_div(tiles_of(p), block(p)); }
  static int64_t tasks(const ConvReluPool& p) { return p.G * blocks(p); }

  // Scratch: inputs [slice][point][tile][lane] | products [tile][point][2 lanes] | a strip of input, later the outputs.
  static int64_t inputs_elements(const ConvReluPool& p) { return slices(p) * POINTS * block(p) * L; }
  static int64_t products_elements(const ConvReluPool& p) { return block(p) * Domain::template TILE<2>; }
  static int64_t outputs_elements(const ConvReluPool& p) { return 4 * block(p) * 2 * L; }
  static int64_t scratch_bytes(const ConvReluPool& p) {
    const int64_t last = most(strip_elements<T>(block(p)), 2 * outputs_elements(p));
    return (inputs_elements(p) + products_elements(p) + last) * sizeof(T);
  }

  // Bias, ReLU and pool of a segment for V vectors of output channels, `live` of them real. value and index: [tile][V *
  // L].
  template <class Pool, int V>
  static void pool_tiles(const ConvReluPool& p, const Segment& s, const T* products, const T* bias, int64_t live,
                         T* value, IntOf<T>* at, Storage* y, uint8_t* index) {
    for (int64_t tile = 0; tile < s.count; tile++) {
      for (int v = 0; v < V; v++) {
        Vec<T> conv[2][2];
        Domain::template transform_products<V>(products + (s.first + tile) * Domain::template TILE<V> + v * L,
                                               load(bias + v * L), conv);
        Pool pool;
        for (int i = 0; i < 4; i++) pool.take(conv[i / 2][i % 2], i);
        pool.finish(4);
        store(value + (tile * V + v) * L, pool.value);
        if (index) store(at + (tile * V + v) * L, pool.index);
      }
    }
    // rows follow each other without a gap in y and index, so a segment is one block of columns
    const int64_t to = s.row * p.y.h + s.column * p.y.w;
    copy_block(y + to, {p.y.w, p.y.c}, value, {V * L, 1}, s.count, live);
    if (index) copy_block(index + to, {p.index.w, p.index.c}, at, {V * L, 1}, s.count, live);
  }

  // The same where nothing is pooled: every tile gives 2x2 outputs, of which the last ones may overhang.
  template <class Pool, int V>
  static void place_tiles(const ConvReluPool& p, const Segment& s, const T* products, const T* bias, int64_t live,
                          T* value, IntOf<T>* at, const Storage* r, Storage* y, uint8_t* index) {
    const int64_t columns = 2 * s.count;
    for (int64_t tile = 0; tile < s.count; tile++) {
      for (int v = 0; v < V; v++) {
        Vec<T> conv[2][2];
        Domain::template transform_products<V>(products + (s.first + tile) * Domain::template TILE<V> + v * L,
                                               load(bias + v * L), conv);
        for (int i = 0; i < 4; i++) {
          Pool pool;
          pool.take(conv[i / 2][i % 2], 0);
          const int64_t place = (i / 2 * columns + 2 * tile + i % 2) * V * L + v * L;
          store(value + place, r ? conv[i / 2][i % 2] : pool.value);
          if (index) store(at + place, pool.index);
        }
      }
    }
    const int64_t width = least(columns, p.OW - 2 * s.column);
    for (int64_t i = 0; i < 2 && 2 * s.row + i < p.OH; i++) {
      const int64_t to = (2 * s.row + i) * p.y.h + 2 * s.column * p.y.w;
      const T* from = value + i * columns * V * L;
      if (r) {
        copy_block(y + to, {p.y.w, p.y.c}, from, {V * L, 1}, width, live, Rectified<Storage, T>{y, r, p.relu});
        continue;
      }
      copy_block(y + to, {p.y.w, p.y.c}, from, {V * L, 1}, width, live);
      if (index) copy_block(index + to, {p.index.w, p.index.c}, at + (from - value), {V * L, 1}, width, live);
    }
  }

  template <class Pool, int V>
  static void run_vectors(const ConvReluPool& p, int64_t begin, int64_t end, const T* inputs, const T* filters,
                          const T* bias, int64_t live, T* products, const Storage* r, Storage* y, uint8_t* index) {
    Domain::template multiply<V>(inputs, block(p), end - begin, filters, p.C, p.C, products);
    T* value = products + products_elements(p);
    auto* at = reinterpret_cast<IntOf<T>*>(value + outputs_elements(p));
    segments(p, begin, end, pooled(p), [&](const Segment& s) {
      Storage* to = y + s.n * p.y.n;
      uint8_t* index_to = index ? index + s.n * p.index.n : nullptr;
      if (pooled(p)) return pool_tiles<Pool, V>(p, s, products, bias, live, value, at, to, index_to);
      place_tiles<Pool, V>(p, s, products, bias, live, value, at, r ? r + s.n * p.y.n : r, to, index_to);
    });
  }

  static void run(const ConvReluPool& p, const void* x, const void* packed, const void* r, void* y, uint8_t* index,
                  int64_t task, void* scratch) {
    const int64_t group = task / blocks(p), begin = task % blocks(p) * block(p),
                  end = least(begin + block(p), tiles_of(p));
    T* inputs = static_cast<T*>(scratch);
    T* products = inputs + inputs_elements(p);
    segments(p, begin, end, false, [&](const Segment& s) {
      const Storage* image = static_cast<const Storage*>(x) + s.n * p.x.n + group * p.C * p.x.c;
      transform_inputs(p, s, image, p.C, products + products_elements(p), inputs, block(p) * L);
    });
    const T* filters = static_cast<const T*>(packed) + group * group_elements(p);
    const T* bias = filters + filter_elements(p);
    for (int64_t k = 0; k < p.K; k += 2 * L) {
      const int64_t live = least(2 * L, p.K - k), channel = group * p.K + k;
      with_pool<T>(p, index, [&](auto pool) {
        (live > L ? run_vectors<decltype(pool), 2>
                  : run_vectors<decltype(pool), 1>)(p, begin, end, inputs, filters + k * POINTS * p.C, bias + k, live,
                                                    products,
                                                    r ? static_cast<const Storage*>(r) + channel * p.y.c : nullptr,
                                                    static_cast<Storage*>(y) + channel * p.y.c,
                                                    index ? index + channel * p.index.c : nullptr);
      });
    }
  }

  static constexpr ConvReluPoolFwd table = {packed_bytes, pack_tasks, pack, scratch_bytes, tasks, run};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolFwds, conv_relu_pool_winograd) = {
    {Winograd<float>::table, Winograd<double>::table, Winograd<BFloat16>::table, Winograd<Float16>::table}};
