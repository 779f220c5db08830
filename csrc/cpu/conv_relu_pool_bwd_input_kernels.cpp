// Gradient of conv_relu_pool's input: patch(dx, place) += sum over k  g * w[k], for the output channels k whose
// gradient g stands at that place of the convolution.
//
// A task owns some blocks of input channels and some rows of one image. Bands of pooled rows scatter into a tile that
// slides down the image; at each place the filters that meet it add up in registers before the tile is touched.
#include "cpu/conv_relu_pool_patch.h"

namespace {

constexpr int64_t BAND_OUTPUTS = 32;  // outputs per channel of one band: how often a block of filters in cache is used
constexpr int64_t TASK_BLOCKS = 4;    // blocks of input channels of one task: how often a band's gradients are used
constexpr int64_t FILTERS = 64;       // that are matched against an index at once: bits of a mask

template <class Storage>
struct BwdInput {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;

  struct Plan {
    Patch patch;
    int64_t filters;                       // output channels of a group, padded to whole masks
    int64_t block_parts;                   // tasks over blocks of channels
    int64_t rows, bands;                   // pooled rows of a band, bands
    int64_t tile_rows, step, columns;      // rows of the tile, by which it slides per band; its columns
    int64_t splits, bands_of_split, halo;  // tasks over rows; earlier bands that reach into a split's first row
    int64_t tile_elements;

    explicit Plan(const ConvReluPool& p)
        : patch(p, L, 1),
          filters(ceil_div(p.K, FILTERS) * FILTERS),
          block_parts(ceil_div(patch.blocks, TASK_BLOCKS)),
          rows(least(p.PH, ceil_div(BAND_OUTPUTS, p.PW))),
          bands(ceil_div(p.PH, rows)),
          tile_rows(rows_under(p, (rows - 1) * p.pool_stride_h + p.pool_h)),
          step(rows * p.pool_stride_h * p.stride_h),
          columns(columns_under(p, (p.PW - 1) * p.pool_stride_w + p.pool_w)),
          // rows come out the same however they are split, so the split may depend on the threads
          bands_of_split(ceil_div(bands, least(bands, ceil_div(2 * p.threads, p.N * p.G * block_parts)))),
          tile_elements(ceil_div(tile_rows * columns * patch.channels + L, L) * L) {
      splits = ceil_div(bands, bands_of_split);
      halo = ceil_div(most(0, tile_rows - step), step);
    }
  };

  static int64_t tasks(const ConvReluPool& p) {
    const Plan plan(p);
    return p.N * p.G * plan.block_parts * plan.splits;
  }
  // Scratch: tiles [block of channels] | gradients [output of a band][k] | their indices, likewise.
  static int64_t scratch_bytes(const ConvReluPool& p) {
    const Plan plan(p);
    return TASK_BLOCKS * plan.tile_elements * sizeof(T) + plan.rows * p.PW * plan.filters * (sizeof(T) + 1);
  }

  // Packed: filters [group][block][k][run][vectors], 0 where a run's last vector overhangs.
  static int64_t packed_bytes(const ConvReluPool& p) {
    const Patch patch(p, L, 1);
    return p.G * patch.blocks * p.K * patch.elements(L) * sizeof(T);
  }
  static int64_t pack_tasks(const ConvReluPool& p) { return p.G * p.K; }
  static void pack(const ConvReluPool& p, const void* weight, void* packed, int64_t task) {
    const Patch patch(p, L, 1);
    const int64_t group = task / p.K, k = task % p.K;
    const Storage* from = static_cast<const Storage*>(weight) + task * p.w.k;
    for (int64_t block = 0; block < patch.blocks; block++) {
      T* to = static_cast<T*>(packed) + ((group * patch.blocks + block) * p.K + k) * patch.elements(L);
      memset(to, 0, patch.elements(L) * sizeof(T));
      const int64_t c0 = block * patch.channels, live = least(patch.channels, p.C - c0);
      patch.each_row(p, L, [&](int64_t place, int64_t step, int64_t tap, int64_t taps) {
        copy_block(to + place, {step, 1}, from + c0 * p.w.c + tap * p.w.tap, {p.w.tap, p.w.c}, taps, live);
      });
    }
  }

  // What a band scatters: per output of the band, its channels' gradients and indices.
  struct Band {
    const ConvReluPool& p;
    const Plan& plan;
    int64_t rows;  // of pooled outputs
    const T* gradient;
    const uint8_t* index;
  };

  // Adds a piece of RUNS runs, which start at `runs` relative to a patch, for the filters [k0, k0 + FILTERS).
  template <int RUNS, int VECTORS>
  static void at(const Band& band, int64_t k0, const int64_t* runs, const T* filters, T* tile) {
    const ConvReluPool& p = band.p;
    const Patch& patch = band.plan.patch;
    const int64_t row = band.plan.columns * patch.channels, step = patch.elements(L);
    // lanes beyond a run's end hold 0 * g, which is NaN where g is not finite: they must not reach the tile
    const int64_t last = patch.runs.length - (VECTORS - 1) * L;
    Vec<IntOf<T>> inside;
    for (int i = 0; i < L; i++) inside[i] = i < last ? -1 : 0;
    for (int64_t output = 0; output < band.rows * p.PW; output++) {
      const T* gradient = band.gradient + output * band.plan.filters + k0;
      const uint8_t* index = band.index + output * band.plan.filters + k0;
      T* window = tile + output / p.PW * p.pool_stride_h * p.stride_h * row +
                  output % p.PW * p.pool_stride_w * p.stride_w * patch.channels;
      for (int64_t place = 0; place < p.pool_h * p.pool_w; place++) {
        uint64_t mask = p.average ? bytes_with_bit(index, int(place)) : bytes_equal_to(index, uint8_t(place));
        if (!mask) continue;
        Vec<T> acc[RUNS][VECTORS] = {};
        for (; mask; mask &= mask - 1) {
          const int k = __builtin_ctzll(mask);
          const T* filter = filters + k * step;
#pragma GCC unroll 7
          for (int r = 0; r < RUNS; r++) {
#pragma GCC unroll 7
            for (int v = 0; v < VECTORS; v++) acc[r][v] += load(filter + (r * VECTORS + v) * L) * gradient[k];
          }
        }
        T* to = window + place / p.pool_w * p.stride_h * row + place % p.pool_w * p.stride_w * patch.channels;
#pragma GCC unroll 7
        for (int r = 0; r < RUNS; r++) {
          acc[r][VECTORS - 1] = (Vec<T>)((Vec<IntOf<T>>)acc[r][VECTORS - 1] & inside);
#pragma GCC unroll 7
          for (int v = 0; v < VECTORS; v++) store(to + runs[r] + v * L, load(to + runs[r] + v * L) + acc[r][v]);
        }
      }
    }
  }

  // Channels become contiguous: gradient and index [output of the band][k].
  static void load_band(const ConvReluPool& p, const Plan& plan, int64_t ph, int64_t rows, const Storage* dy,
                        const uint8_t* index, T* gradient, uint8_t* at) {
    for (int64_t i = 0; i < rows; i++) {
      T* g = gradient + i * p.PW * plan.filters;
      copy_block(g, {plan.filters, 1}, dy + (ph + i) * p.y.h, {p.y.w, p.y.c}, p.PW, p.K);
      copy_block(at + i * p.PW * plan.filters, {plan.filters, 1}, index + (ph + i) * p.index.h, {p.index.w, p.index.c},
                 p.PW, p.K);
      for (int64_t j = 0; p.average && j < p.PW; j++) {
        const T share = T(divisor(p, window_h(p, ph + i), window_w(p, j)));
        for (int64_t k = 0; k < p.K; k++) g[j * plan.filters + k] /= share;
      }
    }
  }

  static void run(const ConvReluPool& p, const void* packed, const void* dy, const uint8_t* index, void* dx,
                  int64_t task, void* scratch) {
    const Plan plan(p);
    const Patch& patch = plan.patch;
    const int64_t begin = task % plan.splits * plan.bands_of_split,
                  end = least(begin + plan.bands_of_split, plan.bands);
    task /= plan.splits;
    const int64_t block0 = task % plan.block_parts * TASK_BLOCKS, blocks = least(TASK_BLOCKS, patch.blocks - block0);
    task /= plan.block_parts;
    const int64_t group = task % p.G, n = task / p.G;

    T* tiles = static_cast<T*>(scratch);
    T* gradient = tiles + TASK_BLOCKS * plan.tile_elements;
    auto* at = reinterpret_cast<uint8_t*>(gradient + plan.rows * p.PW * plan.filters);
    memset(tiles, 0, blocks * plan.tile_elements * sizeof(T));
    memset(at, p.average ? 0 : CUT, plan.rows * p.PW * plan.filters);
    const int64_t row = plan.columns * patch.channels, left = -p.pool_padding_w * p.stride_w;
    int64_t starts[PATCH_RUNS];

    for (int64_t b = most(0, begin - plan.halo); b < end; b++) {
      const int64_t ph = b * plan.rows, rows = least(plan.rows, p.PH - ph);
      load_band(p, plan, ph, rows, static_cast<const Storage*>(dy) + n * p.y.n + group * p.K * p.y.c,
                index + n * p.index.n + group * p.K * p.index.c, gradient, at);
      const Band band{p, plan, rows, gradient, at};
      const int64_t top =
          (ph * p.pool_stride_h - p.pool_padding_h) * p.stride_h - p.padding_h;  // dx's row of the tile's
      const int64_t finished = b + 1 == plan.bands ? p.H - top : plan.step;
      for (int64_t block = 0; block < blocks; block++) {
        const int64_t c0 = (block0 + block) * patch.channels, live = least(patch.channels, p.C - c0);
        T* tile = tiles + block * plan.tile_elements;
        pieces(patch, [&](int64_t first, int64_t runs) {
          for (int64_t r = 0; r < runs; r++) starts[r] = patch.runs.offset(p, first + r, row, patch.channels);
          const auto add_patches = patch_function<BwdInput>(runs, patch.vectors);
          const T* filters = static_cast<const T*>(packed) +
                             (group * patch.blocks + block0 + block) * p.K * patch.elements(L) +
                             first * patch.vectors * L;
          for (int64_t k = 0; k < p.K; k += FILTERS)
            add_patches(band, k, starts, filters + k * patch.elements(L), tile);
        });
        if (b < begin) continue;
        Storage* to = static_cast<Storage*>(dx) + n * p.x.n + (group * p.C + c0) * p.x.c;
        for (int64_t i = 0; i < finished; i++) {
          if (top + i < 0 || top + i >= p.H) continue;
          store_row(p, tile + i * row, left, i < plan.tile_rows ? plan.columns : 0, patch.channels, live,
                    to + (top + i) * p.x.h);
        }
      }
      for (int64_t block = 0; block < blocks; block++) {  // slide
        T* tile = tiles + block * plan.tile_elements;
        const int64_t kept = most(0, plan.tile_rows - plan.step) * row;
        memmove(tile, tile + plan.step * row, kept * sizeof(T));
        memset(tile + kept, 0, (plan.tile_elements - kept) * sizeof(T));
      }
    }
  }

  static constexpr ConvReluPoolBwdInput table = {packed_bytes, pack_tasks, pack, scratch_bytes, tasks, run};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolBwdInputs, conv_relu_pool_bwd_input) = {
    {BwdInput<float>::table, BwdInput<double>::table, BwdInput<BFloat16>::table, BwdInput<Float16>::table}};
