// conv_relu_pool of large strided filters, as in a network's first layer. A convolution of stride s is one of stride 1
// over the s * s phases of its input,
//
//   conv[i, j, k] = b[k] + sum over (c, a, b), r, s   x[c][sh (i + r) + a][sw (j + s) + b]   w[k][c][sh r + a][sw s +
//   b],
//
// whose filters have only 3 or 4 taps a side, few enough for Winograd: 2x2 outputs of 11x11 filters of stride 4 take
// 16 * 16 products per input channel instead of 4 * 121, of 7x7 filters of stride 2 they take 25 * 4 instead of 4 * 49.
//
// A task is a band of pooled rows of one image. Row by row of tiles, the phases of the input are gathered, transformed
// and multiplied, and give two rows of the convolution to the pool's ring: any pool will do.
#include "cpu/conv_relu_pool_tile.h"
#include "cpu/conv_relu_pool_winograd.h"

namespace {

template <class Storage, int TAPS>
struct Polyphase {
  using T = Compute<Storage>;
  using Domain = Products<T, TAPS>;
  static constexpr int L = LANES<T>, SIDE = Domain::SIDE, POINTS = Domain::POINTS;

  // The channels (c, a, b) of the phases, by rows a, and then so that neighbours are neighbours in the input as well.
  static int64_t channels(const ConvReluPool& p) { return p.stride_h * p.stride_w * p.C; }
  static int64_t slices(const ConvReluPool& p) { return ceil_div(channels(p), L); }
  static bool planes(const ConvReluPool& p) { return p.x.c != 1 && p.stride_w > 1; }
  static int64_t channel(const ConvReluPool& p, int64_t c, int64_t a, int64_t b) {
    return planes(p) ? (a * p.C + c) * p.stride_w + b : (a * p.stride_w + b) * p.C + c;
  }
  // Those whose filters have TAPS rows. Others have one less, and nothing but zeros at the point infinity, which reads
  // the last row alone: resnet_stem -14 %, alexnet_conv1 -9 % of the time on one core.
  static int64_t tall_channels(const ConvReluPool& p) {
    return most(0, least(p.stride_h, p.R - (TAPS - 1) * p.stride_h)) * p.stride_w * p.C;
  }

  // Packed: per group, filters [vector of channels k][point][channel][lane], then the bias [vector of channels][lane].
  static int64_t width(const ConvReluPool& p) { return ceil_div(p.K, L) * L; }
  static int64_t group_elements(const ConvReluPool& p) { return width(p) * (POINTS * channels(p) + 1); }
  static int64_t packed_bytes(const ConvReluPool& p) { return p.G * group_elements(p) * sizeof(T); }
  static int64_t pack_tasks(const ConvReluPool& p) { return p.G * width(p) / L; }

  static void pack(const ConvReluPool& p, const void* weight, const void* scale, const void* bias, void* packed,
                   int64_t task) {
    const int64_t group = task / (width(p) / L), k0 = task % (width(p) / L) * L, live = least(L, p.K - k0);
    T* filters = static_cast<T*>(packed) + group * group_elements(p);
    const Storage* from = static_cast<const Storage*>(weight) + (group * p.K + k0) * p.w.k;
    const int64_t first = group * p.K + k0;
    T factors[L];
    load_channels(scale ? static_cast<const T*>(scale) + first : nullptr, live, T(1), factors);
    for (int64_t phase = 0; phase < channels(p); phase++) {
      const int64_t c = phase / (p.stride_h * p.stride_w), a = phase / p.stride_w % p.stride_h, b = phase % p.stride_w;
      T taps[TAPS * TAPS * L] = {};
      for (int64_t r = a; r < p.R; r += p.stride_h) {
        for (int64_t s = b; s < p.S; s += p.stride_w) {
          T* tap = taps + (r / p.stride_h * TAPS + s / p.stride_w) * L;
          copy_block(tap, {L, 1}, from + c * p.w.c + (r * p.S + s) * p.w.tap, {1, p.w.k}, 1, live);
        }
      }
      Domain::transform_filter(taps, L, load(factors), filters + (k0 * POINTS * channels(p)) + channel(p, c, a, b) * L,
                               channels(p) * L);
    }
    load_channels(bias ? static_cast<const Storage*>(bias) + first : nullptr, live, T(0),
                  filters + width(p) * POINTS * channels(p) + k0);
  }

  static int64_t band(const ConvReluPool& p) { return ceil_div(p.PH, least(p.PH, ceil_div(2 * p.threads, p.N * p.G))); }
  static int64_t bands(const ConvReluPool& p) { return ceil_div(p.PH, band(p)); }
  static int64_t tasks(const ConvReluPool& p) { return p.N * p.G * bands(p); }

  // Scratch: phases [row % SIDE][column][channel] | inputs [slice][point][tile][lane] | products | the pool's.
  static int64_t tiles(const ConvReluPool& p) { return ceil_div(p.OW, 2); }
  static int64_t phases_row(const ConvReluPool& p) { return (2 * tiles(p) + TAPS - 1) * slices(p) * L; }
  static int64_t inputs_elements(const ConvReluPool& p) { return slices(p) * POINTS * tiles(p) * L; }
  static constexpr int64_t PRODUCTS = PRODUCT_ROWS * Domain::template TILE<2>;
  static int64_t scratch_bytes(const ConvReluPool& p) {
    return (SIDE * phases_row(p) + inputs_elements(p) + PRODUCTS + pool_rows_scratch<2, T>(p, width(p))) * sizeof(T);
  }

  // Row i of the phases: x[c][sh i + a][sw j + b] for all c, a, b and columns j, 0 outside of the image.
  static void load_phases(const ConvReluPool& p, const Storage* x, int64_t i, T* to) {
    const int64_t step = slices(p) * L, columns = phases_row(p) / step;
    memset(to, 0, phases_row(p) * sizeof(T));
    for (int64_t a = 0; a < p.stride_h; a++) {
      const int64_t h = p.stride_h * i + a - p.padding_h;
      if (h < 0 || h >= p.H) continue;
      const Storage* row = x + h * p.x.h;
      for (int64_t c = 0; planes(p) && c < p.C; c++) {
        const auto spread = p.stride_w == 2 ? spread_row<2> : p.stride_w == 4 ? spread_row<4> : spread_row<0>;
        spread(p, row + c * p.x.c, columns, to + channel(p, c, a, 0), step);
      }
      for (int64_t b = 0; !planes(p) && b < p.stride_w; b++) {
        const int64_t j = ceil_div(most(0, p.padding_w - b), p.stride_w);  // the first column that has this phase
        const int64_t w = p.stride_w * j + b - p.padding_w, n = least(columns - j, ceil_div(p.W - w, p.stride_w));
        copy_block(to + j * step + channel(p, 0, a, b), {step, 1}, row + w * p.x.w, {p.stride_w * p.x.w, p.x.c}, n,
                   p.C);
      }
    }
  }

  // One plane's row x[w], w = sw j + b - padding_w, to the neighbouring phases b of columns j. STRIDE is sw, or 0 if
  // any.
  template <int STRIDE>
  static void spread_row(const ConvReluPool& p, const Storage* x, int64_t columns, T* to, int64_t step) {
    const int64_t stride = STRIDE ? STRIDE : p.stride_w, covered = least(p.W, columns * stride - p.padding_w);
    const int64_t first = ceil_div(p.padding_w, stride), last = (p.padding_w + covered) / stride;  // whole columns
    const auto copy = [&](int64_t w) {
      const int64_t at = w + p.padding_w;
      to[at / stride * step + at % stride] = Convert<T, Storage>::from(x[w * p.x.w]);
    };
    for (int64_t w = 0; w < least(covered, first * stride - p.padding_w); w++) copy(w);
    for (int64_t j = first; j < last; j++) {
      for (int64_t b = 0; b < stride; b++) {
        to[j * step + b] = Convert<T, Storage>::from(x[(j * stride + b - p.padding_w) * p.x.w]);
      }
    }
    for (int64_t w = most(0, last * stride - p.padding_w); w < covered; w++) copy(w);
  }

  template <class Pool>
  static void run_band(const ConvReluPool& p, int64_t begin, int64_t end, const Storage* x, const T* filters,
                       const Storage* r, T* scratch, Storage* y, uint8_t* index) {
    T* inputs = scratch + SIDE * phases_row(p);
    T* products = inputs + inputs_elements(p);
    const T* bias = filters + width(p) * POINTS * channels(p);
    const int64_t step = tiles(p) * L;  // between points
    int64_t loaded = 0;                 // rows of the phases
    const auto convolve = [&](int64_t row, const Ring<T>& ring) {
      for (loaded = most(loaded, row); loaded < row + SIDE; loaded++) {
        load_phases(p, x, loaded, scratch + loaded % SIDE * phases_row(p));
      }
      for (int64_t slice = 0; slice < slices(p); slice++) {
        const T* rows[SIDE];
        for (int i = 0; i < SIDE; i++) rows[i] = scratch + (row + i) % SIDE * phases_row(p) + slice * L;
        Domain::transform_inputs(rows, slices(p) * L, tiles(p), inputs + slice * POINTS * step, step);
      }
      for (int64_t k = 0; k < width(p); k += 2 * L) {
        (width(p) - k > L ? give_rows<2> : give_rows<1>)(p, inputs, filters + k * POINTS * channels(p), bias + k,
                                                         products, ring[row] + k, ring[row + 1] + k);
      }
    };
    pool_rows<2, Pool>(p, begin, end, width(p), p.K, convolve, products + PRODUCTS, r, y, index);
  }

  // V vectors of channels of two rows of the convolution.
  template <int V>
  static void give_rows(const ConvReluPool& p, const T* inputs, const T* filters, const T* bias, T* products, T* first,
                        T* second) {
    for (int64_t begin = 0, n; begin < tiles(p); begin += n) {
      n = balanced_rows(tiles(p) - begin);
      Domain::template multiply<V>(inputs + begin * L, tiles(p), n, filters, channels(p), tall_channels(p), products);
      for (int64_t tile = begin; tile < begin + n; tile++) {
        for (int v = 0; v < V; v++) {
          const T* of_tile = products + (tile - begin) * Domain::template TILE<V> + v * L;
          Vec<T> conv[2][2];
          Domain::template transform_products<V>(of_tile, load(bias + v * L), conv);
          for (int j = 0; j < 2; j++) {
            store(first + (2 * tile + j) * width(p) + v * L, conv[0][j]);
            store(second + (2 * tile + j) * width(p) + v * L, conv[1][j]);
          }
        }
      }
    }
  }

  static void run(const ConvReluPool& p, const void* x, const void* packed, const void* r, void* y, uint8_t* index,
                  int64_t task, void* scratch) {
    const int64_t n = task / (p.G * bands(p)), group = task / bands(p) % p.G, begin = task % bands(p) * band(p);
    with_pool<T>(p, index, [&](auto pool) {
      run_band<decltype(pool)>(p, begin, least(begin + band(p), p.PH),
                               static_cast<const Storage*>(x) + n * p.x.n + group * p.C * p.x.c,
                               static_cast<const T*>(packed) + group * group_elements(p),
                               r ? static_cast<const Storage*>(r) + n * p.y.n + group * p.K * p.y.c : nullptr,
                               static_cast<T*>(scratch), static_cast<Storage*>(y) + n * p.y.n + group * p.K * p.y.c,
                               index ? index + n * p.index.n + group * p.K * p.index.c : nullptr);
    });
  }
};

// Filters of up to 3 taps a phase, or of 4.
template <class Storage>
struct AnyPolyphase {
  using Three = Polyphase<Storage, 3>;
  using Four = Polyphase<Storage, 4>;
  static bool three(const ConvReluPool& p) { return p.R <= 3 * p.stride_h && p.S <= 3 * p.stride_w; }

  static int64_t packed_bytes(const ConvReluPool& p) {
    return three(p) ? Three::packed_bytes(p) : Four::packed_bytes(p);
  }
  static int64_t pack_tasks(const ConvReluPool& p) { return Three::pack_tasks(p); }
  static void pack(const ConvReluPool& p, const void* weight, const void* scale, const void* bias, void* packed,
                   int64_t task) {
    (three(p) ? Three::pack : Four::pack)(p, weight, scale, bias, packed, task);
  }
  static int64_t scratch_bytes(const ConvReluPool& p) {
    return three(p) ? Three::scratch_bytes(p) : Four::scratch_bytes(p);
  }
  static int64_t tasks(const ConvReluPool& p) { return Three::tasks(p); }
  static void run(const ConvReluPool& p, const void* x, const void* packed, const void* r, void* y, uint8_t* index,
                  int64_t task, void* scratch) {
    (three(p) ? Three::run : Four::run)(p, x, packed, r, y, index, task, scratch);
  }
  static constexpr ConvReluPoolFwd table = {packed_bytes, pack_tasks, pack, scratch_bytes, tasks, run};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolFwds,
                conv_relu_pool_polyphase) = {{AnyPolyphase<float>::table, AnyPolyphase<double>::table,
                                              AnyPolyphase<BFloat16>::table, AnyPolyphase<Float16>::table}};
