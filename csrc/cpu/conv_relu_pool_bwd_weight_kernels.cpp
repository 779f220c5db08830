// Gradients of conv_relu_pool's weight and bias: dw[k] = sum over places g * patch(x, place), db[k] = sum g.
//
// A task owns some output channels k, some blocks of input channels and a range of images. It walks tiles of pooled
// outputs small enough that their input stays in the first-level cache; per tile and k it lists the gradients that
// survive, then adds their patches up in registers.
#include "cpu/conv_relu_pool_patch.h"

namespace {

constexpr int64_t TILE_BYTES = 32 << 10;  // of input under one tile of outputs
constexpr int64_t TILE_OUTPUTS = 64;      // outputs of one tile
constexpr int64_t TASK_FILTERS = 64;      // output channels of one task: how often a loaded tile is used
constexpr int64_t TASK_BLOCKS = 4;        // blocks of input channels of one task: how often a list is used
constexpr int64_t TASKS = 32;             // below which the images are cut into chunks with sums of their own

template <class Storage>
struct BwdWeight {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;

  // A tile of outputs [rows][columns]; unclipped windows, so that no index can point outside of the input tile.
  struct Tile {
    int64_t rows, columns, input_rows, input_columns;
    Tile(const ConvReluPool& p, int64_t rows, int64_t columns)
        : rows(rows),
          columns(columns),
          input_rows(rows_under(p, (rows - 1) * p.pool_stride_h + p.pool_h)),
          input_columns(columns_under(p, (columns - 1) * p.pool_stride_w + p.pool_w)) {}
    int64_t elements(int64_t channels) const { return input_rows * input_columns * channels; }
  };
  static Tile fitting_tile(const ConvReluPool& p, int64_t channels) {
    int64_t rows = p.PH, columns = p.PW;
    while (rows * columns > 1 && (rows * columns > TILE_OUTPUTS ||
                                  Tile(p, rows, columns).elements(channels) * int64_t(sizeof(T)) > TILE_BYTES)) {
      (columns >= rows ? columns : rows) = ceil_div(columns >= rows ? columns : rows, 2);
    }
    return Tile(p, rows, columns);
  }

  // How the work is cut. It depends on shapes alone, so that the order of every sum, and its bits, never change.
  struct Plan {
    Patch patch;
    Tile tile;
    int64_t filter_parts, block_parts, tile_rows, chunks;
    int64_t filter_sums;  // elements of one output channel's sums: [block][patch] and the bias in lanes
    int64_t list_length, tile_elements;

    explicit Plan(const ConvReluPool& p)
        : patch(p, L, 2),
          tile(fitting_tile(p, patch.channels)),
          filter_parts(ceil_div(p.K, TASK_FILTERS)),
          block_parts(ceil_div(patch.blocks, TASK_BLOCKS)),
          tile_rows(p.N * ceil_div(p.PH, tile.rows)),
          chunks(least(tile_rows, ceil_div(TASKS, p.G * filter_parts * block_parts))),
          filter_sums(patch.blocks * patch.elements(L) + L),
          list_length(tile.rows * tile.columns * (p.average ? p.pool_h * p.pool_w : 1)),
          // a run's last vector may reach beyond its end
          tile_elements(ceil_div(tile.elements(patch.channels) + L, L) * L) {}
  };

  static int64_t tasks(const ConvReluPool& p) {
    const Plan plan(p);
    return plan.chunks * p.G * plan.filter_parts * plan.block_parts;
  }
  // Sums: [chunk][k of all groups][filter_sums].
  static int64_t sums_bytes(const ConvReluPool& p) {
    const Plan plan(p);
    return plan.chunks * p.G * p.K * plan.filter_sums * sizeof(T);
  }
  // Scratch: input tile | gradients [k][list_length] | offsets of their patches, likewise.
  static int64_t scratch_bytes(const ConvReluPool& p) {
    const Plan plan(p);
    return plan.tile_elements * sizeof(T) + TASK_FILTERS * plan.list_length * (sizeof(T) + sizeof(int32_t));
  }

  // Lists the gradients of one output channel that survive in a tile, and where their patches start in the input tile.
  static int64_t list(const ConvReluPool& p, const int32_t* place, int64_t row_step, int64_t column_step, int64_t ph,
                      int64_t pw, int64_t rows, int64_t columns, const Storage* dy, const uint8_t* index, T* gradient,
                      int32_t* offset) {
    const int64_t area = p.pool_h * p.pool_w;
    int64_t n = 0;
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < columns; j++) {
        const T g = Convert<T, Storage>::from(dy[(ph + i) * p.y.h + (pw + j) * p.y.w]);
        const int64_t at = index[(ph + i) * p.index.h + (pw + j) * p.index.w], start = i * row_step + j * column_step;
        if (p.average) {
          const T share = g / T(divisor(p, window_h(p, ph + i), window_w(p, pw + j)));
          for (int64_t bit = 0; bit < area; bit++) {
            gradient[n] = share, offset[n] = int32_t(start + place[bit]);
            n += at >> bit & 1;
          }
        } else {  // no branch: whether a gradient survives is anyone's guess
          gradient[n] = g, offset[n] = int32_t(start + place[at]);
          n += at < area;
        }
      }
    }
    return n;
  }

  // sums[run][vector] += sum over the list g * patch, for RUNS runs that start at `runs` relative to a patch.
  template <int RUNS, int VECTORS>
  static void at(const T* tile, const int64_t* runs, const T* gradient, const int32_t* offset, int64_t n, T* sums) {
    Vec<T> acc[RUNS][VECTORS] = {};
    int64_t start[RUNS];
    for (int r = 0; r < RUNS; r++) start[r] = runs[r];
    for (int64_t i = 0; i < n; i++) {
      const T* x = tile + offset[i];
#pragma GCC unroll 7
      for (int r = 0; r < RUNS; r++) {
#pragma GCC unroll 7
        for (int v = 0; v < VECTORS; v++) acc[r][v] += load(x + start[r] + v * L) * gradient[i];
      }
    }
#pragma GCC unroll 7
    for (int r = 0; r < RUNS; r++) {
#pragma GCC unroll 7
      for (int v = 0; v < VECTORS; v++) {
        T* to = sums + (r * VECTORS + v) * L;
        store(to, load(to) + acc[r][v]);
      }
    }
  }

  static void run(const ConvReluPool& p, const void* x, const void* dy, const uint8_t* index, void* sums, int64_t task,
                  void* scratch) {
    const Plan plan(p);
    const Patch& patch = plan.patch;
    const int64_t k0 = task % plan.filter_parts * TASK_FILTERS, filters = least(TASK_FILTERS, p.K - k0);
    task /= plan.filter_parts;
    const int64_t block0 = task % plan.block_parts * TASK_BLOCKS, blocks = least(TASK_BLOCKS, patch.blocks - block0);
    task /= plan.block_parts;
    const int64_t group = task % p.G, chunk = task / p.G, channel = group * p.K + k0;
    T* own = static_cast<T*>(sums) + (chunk * p.G * p.K + channel) * plan.filter_sums;
    for (int64_t k = 0; k < filters; k++) {
      memset(own + k * plan.filter_sums + block0 * patch.elements(L), 0, blocks * patch.elements(L) * sizeof(T));
      if (block0 == 0) memset(own + k * plan.filter_sums + patch.blocks * patch.elements(L), 0, L * sizeof(T));
    }

    T* tile = static_cast<T*>(scratch);
    T* gradient = tile + plan.tile_elements;
    auto* offset = reinterpret_cast<int32_t*>(gradient + TASK_FILTERS * plan.list_length);
    const int64_t row = plan.tile.input_columns * patch.channels;
    const int64_t row_step = p.pool_stride_h * p.stride_h * row,
                  column_step = p.pool_stride_w * p.stride_w * patch.channels;
    int32_t place[256] = {};
    for (int64_t i = 0; i < p.pool_h * p.pool_w; i++) {
      place[i] = int32_t(i / p.pool_w * p.stride_h * row + i % p.pool_w * p.stride_w * patch.channels);
    }
    int64_t starts[PATCH_RUNS], lengths[TASK_FILTERS];

    const int64_t rows_per_image = ceil_div(p.PH, plan.tile.rows);
    for (int64_t t = chunk * plan.tile_rows / plan.chunks; t < (chunk + 1) * plan.tile_rows / plan.chunks; t++) {
      const int64_t n = t / rows_per_image, ph = t % rows_per_image * plan.tile.rows;
      for (int64_t pw = 0; pw < p.PW; pw += plan.tile.columns) {
        const int64_t rows = least(plan.tile.rows, p.PH - ph), columns = least(plan.tile.columns, p.PW - pw);
        for (int64_t k = 0; k < filters; k++) {
          T* g = gradient + k * plan.list_length;
          lengths[k] = list(p, place, row_step, column_step, ph, pw, rows, columns,
                            static_cast<const Storage*>(dy) + n * p.y.n + (channel + k) * p.y.c,
                            index + n * p.index.n + (channel + k) * p.index.c, g, offset + k * plan.list_length);
          if (block0 == 0) add_lanes(g, lengths[k], own + k * plan.filter_sums + patch.blocks * patch.elements(L));
        }
        for (int64_t block = block0; block < block0 + blocks; block++) {
          const int64_t c0 = block * patch.channels, live = least(patch.channels, p.C - c0);
          load_tile<Storage>(p, static_cast<const Storage*>(x) + n * p.x.n + (group * p.C + c0) * p.x.c,
                             (ph * p.pool_stride_h - p.pool_padding_h) * p.stride_h,
                             (pw * p.pool_stride_w - p.pool_padding_w) * p.stride_w, plan.tile.input_rows,
                             plan.tile.input_columns, patch.channels, live, tile);
          pieces(patch, [&](int64_t first, int64_t runs) {
            for (int64_t r = 0; r < runs; r++) starts[r] = patch.runs.offset(p, first + r, row, patch.channels);
            const auto add_patches = patch_function<BwdWeight>(runs, patch.vectors);
            T* to = own + block * patch.elements(L) + first * patch.vectors * L;
            for (int64_t k = 0; k < filters; k++) {
              add_patches(tile, starts, gradient + k * plan.list_length, offset + k * plan.list_length, lengths[k],
                          to + k * plan.filter_sums);
            }
          });
        }
      }
    }
  }

  static FASTARCH_INLINE void add_lanes(const T* values, int64_t n, T* lanes) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < n; i += L) sum += n - i >= L ? load(values + i) : load_first(values + i, n - i);
    store(lanes, load(lanes) + sum);
  }

  // dw[k] and db[k] of output channel `task` from the chunks' sums; either may be nullptr.
  static void finish(const ConvReluPool& p, void* sums, void* dw, void* db, int64_t task) {
    const Plan plan(p);
    const Patch& patch = plan.patch;
    T* total = static_cast<T*>(sums) + task * plan.filter_sums;
    for (int64_t chunk = 1; chunk < plan.chunks; chunk++) {
      const T* part = total + chunk * p.G * p.K * plan.filter_sums;
      for (int64_t i = 0; i < plan.filter_sums; i += L) store(total + i, load(total + i) + load(part + i));
    }
    Storage* to = static_cast<Storage*>(dw) + task * p.w.k;
    for (int64_t block = 0; dw && block < patch.blocks; block++) {
      const T* from = total + block * patch.elements(L);
      const int64_t c0 = block * patch.channels, live = least(patch.channels, p.C - c0);
      patch.each_row(p, L, [&](int64_t place, int64_t step, int64_t tap, int64_t taps) {
        copy_block(to + c0 * p.w.c + tap * p.w.tap, {p.w.tap, p.w.c}, from + place, {step, 1}, taps, live);
      });
    }
    if (db) {
      T sum = 0;
      for (int64_t i = 0; i < L; i++) sum += total[patch.blocks * patch.elements(L) + i];
      static_cast<Storage*>(db)[task] = Convert<Storage, T>::from(sum);
    }
  }

  static constexpr ConvReluPoolBwdWeight table = {sums_bytes, scratch_bytes, tasks, run, finish};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolBwdWeights, conv_relu_pool_bwd_weight) = {
    {BwdWeight<float>::table, BwdWeight<double>::table, BwdWeight<BFloat16>::table, BwdWeight<Float16>::table}};
