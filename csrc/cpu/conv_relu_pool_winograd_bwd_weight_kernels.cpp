// Gradients of the weight and bias of a 3x3 convolution that is not pooled, by Winograd's F(2x2, 3x3): the adjoint in w
// of y = A' [(G w G') . (B' d B)] A, over all tiles of 2x2 outputs dy and their 4x4 inputs d,
//
//   dw = G' [sum over tiles  (A dy A') . (B' d B)] G,
//
// 16 products for a tile where a sum over the places has 36.
//
// A task owns PART output channels by PART input channels and a chunk of the tiles. Both sides of a block of tiles are
// transformed once, then for every point the products over its tiles run in registers.
#include "cpu/conv_relu_pool_winograd_tiles.h"

namespace {

constexpr int64_t PART = 64;   // channels of a task: its sums, 256 KB, stay in the second-level cache
constexpr int64_t BLOCK = 48;  // tiles that are transformed at once
constexpr int64_t TASKS = 32;  // below which the tiles are cut into chunks with sums of their own

template <class Storage>
struct WinogradBwdWeight {
  using T = Compute<Storage>;
  using Domain = Products<T, 3>;
  static constexpr int L = LANES<T>, POINTS = Domain::POINTS;
  static constexpr int ROWS = L < 8 ? L : 8;       // output channels whose products run together
  static constexpr int64_t STEP = BLOCK * L;       // between points
  static constexpr int64_t SLICE = POINTS * STEP;  // between vectors of channels

  // How the work is cut. It depends on shapes alone, so that the order of every sum, and its bits, never change.
  struct Plan {
    int64_t K, C;  // channels of a part, in whole vectors
    int64_t k_parts, c_parts, chunks;
    int64_t sums;  // elements of one task's sums: [point][k][c], and the bias [k]

    explicit Plan(const ConvReluPool& p)
        : K(least(PART, ceil_div(p.K, L) * L)),
          C(least(PART, ceil_div(p.C, L) * L)),
          k_parts(ceil_div(p.K, K)),
          c_parts(ceil_div(p.C, C)),
          chunks(least(ceil_div(tiles_of(p), BLOCK), ceil_div(TASKS, k_parts * c_parts))),
          sums((POINTS * C + 1) * K) {}
  };

  static int64_t tasks(const ConvReluPool& p) {
    const Plan plan(p);
    return plan.chunks * plan.k_parts * plan.c_parts;
  }
  // Sums: [chunk][part of k][part of c][sums].
  static int64_t sums_bytes(const ConvReluPool& p) { return tasks(p) * Plan(p).sums * sizeof(T); }
  // Scratch: inputs [slice][point][tile][lane] | gradients, likewise | a strip of one of them.
  static int64_t scratch_bytes(const ConvReluPool& p) {
    const Plan plan(p);
    return ((plan.C + plan.K) / L * SLICE + strip_elements<T>(BLOCK)) * sizeof(T);
  }

  // A dy A' of every tile of a segment, of `filters` output channels from dy on; the convolution ends with zeros.
  static void transform_gradients(const ConvReluPool& p, const Segment& s, const Storage* dy, int64_t filters, T* strip,
                                  T* gradients) {
    ConvReluPool q = p;
    q.x = p.y, q.H = p.OH, q.W = p.OW, q.padding_h = q.padding_w = 0;
    const int64_t columns = 2 * s.count;
    for (int64_t k = 0; k < filters; k += L) {
      load_tile<Storage>(q, dy + k * q.x.c, 2 * s.row, 2 * s.column, 2, columns, L, least(L, filters - k), strip);
      T* to = gradients + k / L * SLICE + s.first * L;
      for (int64_t t = 0; t < s.count; t++)
        Domain::transform_gradient(strip + 2 * t * L, columns * L, to + t * L, STEP);
    }
  }

  // sums[k][c] += sum over n tiles of gradients[k] * inputs[c], for ROWS output channels and V vectors of input ones.
  template <int V>
  static void add_products(const T* gradients, const T* inputs, int64_t n, T* sums, int64_t row) {
    Vec<T> acc[ROWS][V] = {};
    multiply_add<ROWS, V, T, L>(acc, gradients, every(1), inputs, SLICE, n);
#pragma GCC unroll 8
    for (int k = 0; k < ROWS; k++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        T* to = sums + k * row + v * L;
        store(to, load(to) + acc[k][v]);
      }
    }
  }

  static void run(const ConvReluPool& p, const void* x, const void* dy, const uint8_t*, void* sums, int64_t task,
                  void* scratch) {
    const Plan plan(p);
    T* own = static_cast<T*>(sums) + task * plan.sums;
    T* bias = own + POINTS * plan.K * plan.C;
    memset(own, 0, plan.sums * sizeof(T));
    const int64_t c0 = task % plan.c_parts * plan.C, channels = least(plan.C, p.C - c0);
    task /= plan.c_parts;
    const int64_t k0 = task % plan.k_parts * plan.K, filters = least(plan.K, p.K - k0), chunk = task / plan.k_parts;

    T* inputs = static_cast<T*>(scratch);
    T* gradients = inputs + plan.C / L * SLICE;
    T* strip = gradients + plan.K / L * SLICE;
    const int64_t end = (chunk + 1) * tiles_of(p) / plan.chunks;
    for (int64_t begin = chunk * tiles_of(p) / plan.chunks, n; begin < end; begin += n) {
      n = least(BLOCK, end - begin);
      segments(p, begin, begin + n, false, [&](const Segment& s) {
        transform_inputs(p, s, static_cast<const Storage*>(x) + s.n * p.x.n + c0 * p.x.c, channels, strip, inputs,
                         STEP);
        transform_gradients(p, s, static_cast<const Storage*>(dy) + s.n * p.y.n + k0 * p.y.c, filters, strip,
                            gradients);
      });
      for (int64_t k = 0; c0 == 0 && k < filters; k += L) {
        Vec<T> sum = load(bias + k);
        for (int64_t t = 0; t < n; t++) sum += load(gradients + k / L * SLICE + Domain::SUM * STEP + t * L);
        store(bias + k, sum);
      }
      for (int64_t point = 0; point < POINTS; point++) {
        for (int64_t k = 0; k < filters; k += ROWS) {
          const T* rows = gradients + k / L * SLICE + point * STEP + k % L;
          T* to = own + (point * plan.K + k) * plan.C;
          for (int64_t c = 0; c < channels; c += 2 * L) {
            const auto add = channels - c > L ? add_products<2> : add_products<1>;
            add(rows, inputs + c / L * SLICE + point * STEP, n, to + c, plan.C);
          }
        }
      }
    }
  }

  // dw[k] and db[k] of output channel k from the chunks' sums; either may be nullptr.
  static void finish(const ConvReluPool& p, void* sums, void* dw, void* db, int64_t k) {
    const Plan plan(p);
    const int64_t chunk = plan.k_parts * plan.c_parts * plan.sums, row = k % plan.K;
    const T* part = static_cast<const T*>(sums) + k / plan.K * plan.c_parts * plan.sums;
    const auto total = [&](const T* from) {
      Vec<T> sum = load(from);
      for (int64_t i = 1; i < plan.chunks; i++) sum += load(from + i * chunk);
      return sum;
    };
    for (int64_t c = 0; dw && c < p.C; c += L) {
      const T* from = part + c / plan.C * plan.sums + row * plan.C + c % plan.C;
      Vec<T> points[POINTS];
      for (int64_t i = 0; i < POINTS; i++) points[i] = total(from + i * plan.K * plan.C);
      T taps[9 * L];
      Domain::transform_filter_gradient(points, taps);
      copy_block(static_cast<Storage*>(dw) + k * p.w.k + c * p.w.c, {p.w.tap, p.w.c}, taps, {L, 1}, 9,
                 least(L, p.C - c));
    }
    if (db) {
      const T* bias = part + POINTS * plan.K * plan.C + row;
      T sum = bias[0];
      for (int64_t i = 1; i < plan.chunks; i++) sum += bias[i * chunk];
      static_cast<Storage*>(db)[k] = Convert<Storage, T>::from(sum);
    }
  }

  static constexpr ConvReluPoolBwdWeight table = {sums_bytes, scratch_bytes, tasks, run, finish};
};

}  // namespace

FASTARCH_EXPORT(ConvReluPoolBwdWeights, conv_relu_pool_winograd_bwd_weight) = {
    {WinogradBwdWeight<float>::table, WinogradBwdWeight<double>::table, WinogradBwdWeight<BFloat16>::table,
     WinogradBwdWeight<Float16>::table}};
