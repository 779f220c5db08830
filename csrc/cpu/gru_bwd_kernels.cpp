// gru, backward: the reverse walk over a chunk of steps, whose gate gradients are kept in panels [gate][block][row][L];
// then, while caches hold them, the chunk's share of the gradients of inputs, weights and biases.
#include "cpu/gru_tile.h"

namespace {

template <class Storage>
struct Backward {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;
  static constexpr bool SAME = sizeof(T) == sizeof(Storage);
  static constexpr int64_t CHUNK_ROWS = 512;   // (step, sequence) pairs: long products, panels that fit the L3 cache
  static constexpr int64_t COLUMNS = 2;        // vectors of a weight gradient that are summed together
  static constexpr int64_t GRADIENT_RUN = 64;  // rows whose share of a weight gradient is summed at once
  static constexpr int UNITS = TILE_ROWS < L ? TILE_ROWS : L;  // rows of it
  static constexpr int64_t SHARED_UNITS = 32;                  // rows whose sums stay in the L1 cache over a chunk
  enum Gate { R, Z, N_, RESET_N };                             // panels: dr, dz, dn and, with reset_after, dn * r
  alignas(64) static constexpr T ZEROS[MOST_VECTORS * L] = {};

  const Gru p;
  const GruBwd a;
  const Team team;
  const Sequence sequence{p};
  const int64_t blocks = ceil_div(p.H, L), stride = blocks * L;  // vectors of units; from row to row of a state
  const int64_t G = p.reset_after ? 4 : 3;
  const int64_t chunk = least(p.T, ceil_div(CHUNK_ROWS, p.N)), rows = chunk * p.N, panel = rows * L;
  const int64_t input_blocks = ceil_div(p.C, L);
  const int64_t input_groups = ceil_div(input_blocks, COLUMNS), groups = input_groups + ceil_div(blocks, COLUMNS);

  // panels [blocks of columns][3 * stride][L]: gates' units against the columns of inputs or states
  T *w_ih, *w_hh;
  T *dgates, *dh;         // of a step: [N][3 * stride], what meets w_hh; [N][stride]
  T *panels, *packed;     // [G][blocks][rows][L]; of each worker: [COLUMNS][rows][L], what meets them in dw
  T *dw_ih, *dw_hh, *db;  // [3H, C] and [3H, H], the output itself where it is not narrowed; [G][stride]

  Backward(const Gru& p, const GruBwd& a, const Team& team, Memory& m) : p(p), a(a), team(team) {
    w_ih = m.take<T>(input_blocks * 3 * stride * L), w_hh = m.take<T>(blocks * 3 * stride * L);
    dgates = m.take<T>(p.N * 3 * stride), dh = m.take<T>(p.N * stride);
    panels = m.take<T>(G * blocks * panel), packed = m.take<T>(team.size * COLUMNS * panel);
    dw_ih = SAME ? static_cast<T*>(a.dw_ih) : m.take<T>(3 * p.H * p.C);
    dw_hh = SAME ? static_cast<T*>(a.dw_hh) : m.take<T>(3 * p.H * p.H);
    db = m.take<T>(G * stride);
  }

  static int64_t memory_bytes(const Gru& p, const Team& team) {
    Memory counted{};
    Backward(p, {}, team, counted);
    return counted.at;
  }

  static void run(const Gru& p, const GruBwd& a, const Team& team, void* memory) {
    Memory m{reinterpret_cast<uintptr_t>(memory)};
    Backward(p, a, team, m).run();
  }

  void run() const {
    each_worker(team, [&](int64_t worker) { prepare(worker); });
    for (int64_t end = p.T; end > 0; end -= chunk) {
      const Range steps{end > chunk ? end - chunk : 0, end};
      walk(team, p.N, blocks, size(steps), p.reset_after ? 2 : 3,
           [&](int phase, int64_t, Range rows, Range units, int64_t i) {
             const int64_t s = end - 1 - i, first = (s - steps.begin) * p.N;
             if (phase == 0) return gates(rows, units, s, first);
             if (!p.reset_after && phase == 1) return reset_gate(rows, units, s, first);
             state_gradient(rows, units, s);
           });
      each_worker(team, [&](int64_t worker) {
        if (a.dx) input_gradient(part_of(size(steps) * p.N, team.size, worker), steps);
        const Range tasks = part_of(3 * groups, team.size, worker);
        for (int64_t i = tasks.begin; i < tasks.end; i++)
          if (i % groups < input_groups ? a.dw_ih : a.dw_hh)
            weight_gradient(i / groups, i % groups, steps, packed + worker * COLUMNS * panel);
        const Range sums = part_of(G * blocks, team.size, worker);
        for (int64_t i = sums.begin; i < sums.end; i++) bias_gradient(i, size(steps) * p.N);
      });
    }
    each_worker(team, [&](int64_t worker) { finish(worker); });
  }

  void prepare(int64_t worker) const {
    const Range of_inputs = part_of(a.dx ? input_blocks : 0, team.size, worker);
    const Range of_states = part_of(blocks, team.size, worker);
    for (int64_t j = of_inputs.begin; j < of_inputs.end; j++) pack_panel(a.w_ih, p.C, j, w_ih + j * 3 * stride * L);
    for (int64_t j = of_states.begin; j < of_states.end; j++) pack_panel(a.w_hh, p.H, j, w_hh + j * 3 * stride * L);
    const Range sums = part_of(G * blocks, team.size, worker);
    memset(db + sums.begin * L, 0, size(sums) * L * sizeof(T));
    const Range mine = part_of(p.N, team.size, worker);
    if (!a.dh_n) memset(dh + mine.begin * stride, 0, size(mine) * stride * sizeof(T));
    for (int64_t n = mine.begin; a.dh_n && n < mine.end; n++)
      widen_row(static_cast<const Storage*>(a.dh_n) + n * p.H, p.H, dh + n * stride);
  }

  // panel[g * stride + unit][l] = w[g * H + unit][j * L + l], and 0 for units and columns that do not exist.
  void pack_panel(const void* w, int64_t columns, int64_t j, T* panel) const {
    for (int64_t g = 0; g < 3; g++) {
      for (int64_t unit = 0; unit < stride; unit++) {
        const Storage* const row = static_cast<const Storage*>(w) + (g * p.H + unit) * columns + j * L;
        store(panel + (g * stride + unit) * L, unit < p.H ? load_as<T>(row, columns - j * L) : Vec<T>{});
      }
    }
  }

  const Storage* gate(int64_t t, int64_t n, int64_t g) const {
    return static_cast<const Storage*>(a.gates) + ((t * p.N + n) * G + g) * p.H;
  }
  const Storage* state_before(int64_t t, int64_t n) const {
    const int64_t before = sequence.before(t, n);
    return before < 0 ? static_cast<const Storage*>(a.h0) + n * p.H
                      : static_cast<const Storage*>(a.output) + (before * p.N + n) * p.H;
  }
  T* panel_row(int64_t g, int64_t j, int64_t row) const { return panels + ((g * blocks + j) * rows + row) * L; }

  // dz, dn and, with reset_after, dr; dh becomes dh * z. `first` is the panels' row of sequence 0 at this step.
  void gates(Range mine, Range units, int64_t s, int64_t first) const {
    const int64_t t = sequence.time(s);
    for (int64_t n = mine.begin; n < mine.end; n++) {
      T* const to = dgates + n * 3 * stride;
      if (!sequence.live(t, n)) {
        for (int64_t j = units.begin; j < units.end; j++) {
          for (int64_t g = 0; g < G; g++) store(panel_row(g, j, first + n), Vec<T>{});
          for (int64_t g = 0; g < 3; g++) store(to + g * stride + j * L, Vec<T>{});
        }
        continue;
      }
      const Storage* const h = state_before(t, n);
      for (int64_t j = units.begin; j < units.end; j++) {
        const int64_t left = p.H - j * L;
        const auto load_gate = [&](int64_t g) { return load_as<T>(gate(t, n, g) + j * L, left); };
        const auto keep = [&](int64_t g, Vec<T> v) { store(panel_row(g, j, first + n), v); };
        Vec<T> d = load(dh + n * stride + j * L);
        if (a.dy) d += load_as<T>(static_cast<const Storage*>(a.dy) + (t * p.N + n) * p.H + j * L, left);
        const Vec<T> z = load_gate(1), candidate = load_gate(2);
        const Vec<T> dz = d * (load_as<T>(h + j * L, left) - candidate) * (z * (T(1) - z));
        const Vec<T> dn = d * (T(1) - z) * (T(1) - candidate * candidate);
        keep(Z, dz), keep(N_, dn), store(to + stride + j * L, dz);
        Vec<T> meets_w_hn = dn;
        if (p.reset_after) {
          const Vec<T> r = load_gate(0), dr = dn * load_gate(3) * (r * (T(1) - r));
          meets_w_hn = dn * r;
          keep(R, dr), keep(RESET_N, meets_w_hn), store(to + j * L, dr);
        }
        store(to + 2 * stride + j * L, meets_w_hn);
        store(dh + n * stride + j * L, d * z);
      }
    }
  }

  // Without reset_after: q = W_hn' dn, the gradient of r * h, gives dr, and q * r to dh.
  void reset_gate(Range mine, Range units, int64_t s, int64_t first) const {
    const int64_t t = sequence.time(s);
    products(mine, units, t, {2 * stride, stride}, [&](int64_t n, int64_t j, const T* product) {
      const int64_t left = p.H - j * L;
      const Vec<T> r = load_as<T>(gate(t, n, 0) + j * L, left), q = load(product);
      const Vec<T> dr = q * load_as<T>(state_before(t, n) + j * L, left) * (r * (T(1) - r));
      store(panel_row(R, j, first + n), dr), store(dgates + n * 3 * stride + j * L, dr);
      T* const at = dh + n * stride + j * L;
      store(at, load(at) + q * r);
    });
  }

  // dh += W_hr' dr + W_hz' dz, and with reset_after + W_hn' (dn * r).
  void state_gradient(Range mine, Range units, int64_t s) const {
    const Columns all{0, (p.reset_after ? 3 : 2) * stride};
    products(mine, units, sequence.time(s), all, [&](int64_t n, int64_t j, const T* product) {
      T* const at = dh + n * stride + j * L;
      store(at, load(at) + load(product));
    });
  }

  // take(n, j, sum of dgates * w_hh over columns [begin, begin + count) of dgates), for rows that are live.
  struct Columns {
    int64_t begin, count;
  };
  template <class Take>
  FASTARCH_INLINE void products(Range mine, Range units, int64_t t, Columns c, const Take& take) const {
    each_group(are_few(size(mine)) ? 4 : 3, units, [&](int64_t j, int64_t V) {
      alignas(64) T results[STRIP_ROWS * 3 * L];
      Product<T> o;
      o.x = dgates + c.begin, o.length = c.count;
      o.w = w_hh + (j * 3 * stride + c.begin) * L, o.w_step = 3 * stride * L;
      o.init = ZEROS, o.to = results, o.to_step = V * L;
      each_strip(mine, [&](int64_t first, int64_t count) {
        int64_t live[STRIP_ROWS];
        o.rows = 0;
        for (int64_t n = first; n < first + count; n++) {
          if (!sequence.live(t, n)) continue;
          live[o.rows] = n, o.at[o.rows++] = n * 3 * stride;
        }
        multiply(V, o);
        for (int64_t i = 0; i < o.rows; i++)
          for (int64_t v = 0; v < V; v++) take(live[i], j + v, results + (i * V + v) * L);
      });
    });
  }

  // dx = W_ih' [dr, dz, dn], of some rows of the panels.
  void input_gradient(Range mine, Range steps) const {
    each_group(3, {0, input_blocks}, [&](int64_t j, int64_t V) {
      alignas(64) T results[STRIP_ROWS * 3 * L];
      Product<T> o;
      o.x = panels, o.segments = 3 * blocks, o.x_step = panel, o.length = L;
      o.w = w_ih + j * 3 * stride * L, o.w_step = 3 * stride * L;
      o.init = ZEROS, o.to = results, o.to_step = V * L;
      each_strip(mine, [&](int64_t row, int64_t count) {
        o.rows = count;
        for (int64_t i = 0; i < count; i++) o.at[i] = (row + i) * L;
        multiply(V, o);
        for (int64_t i = 0; i < count; i++) {
          const int64_t t = sequence.time(steps.begin + (row + i) / p.N), n = (row + i) % p.N;
          Storage* const to = static_cast<Storage*>(a.dx) + (t * p.N + n) * p.C + j * L;
          narrow_row(results + i * V * L, least(V * L, p.C - j * L), to);
        }
      });
    });
  }

  // Adds the chunk's share of one gate's rows of dW_ih or dW_hh, COLUMNS vectors of them, in runs that begin at 0.
  void weight_gradient(int64_t g, int64_t group, Range steps, T* packed) const {
    const int64_t count = size(steps) * p.N;
    const bool of_state = group >= input_groups;
    const int64_t columns = of_state ? p.H : p.C, column = (of_state ? group - input_groups : group) * COLUMNS * L;
    pack_rows(of_state, column, g, steps, packed);
    const T* const gradients = panel_row(of_state && g == 2 && p.reset_after ? int(RESET_N) : g, 0, 0);
    T* const to = (of_state ? dw_hh : dw_ih) + g * p.H * columns + column;
    const bool first = steps.end == p.T;
    for (int64_t units = 0; units < p.H; units += SHARED_UNITS) {
      alignas(64) T sums[SHARED_UNITS][COLUMNS * L] = {};
      const int64_t some = least(SHARED_UNITS, p.H - units);
      for (int64_t begin = 0; begin < count; begin += GRADIENT_RUN) {
        for (int64_t unit = 0; unit < some; unit += UNITS) {
          Vec<T> acc[UNITS][COLUMNS] = {};
          multiply_add<UNITS, COLUMNS, T, L>(acc,
                                             gradients + (units + unit) / L * panel + (units + unit) % L + begin * L,
                                             every(1), packed + begin * L, panel, least(GRADIENT_RUN, count - begin));
#pragma GCC unroll 8
          for (int i = 0; i < UNITS; i++) {
#pragma GCC unroll 3
            for (int v = 0; v < COLUMNS; v++) {
              T* const at = sums[unit + i] + v * L;
              store(at, load(at) + acc[i][v]);
            }
          }
        }
      }
      for (int64_t unit = 0; unit < some; unit++) {
        for (int64_t v = 0; v < COLUMNS; v++) {
          const int64_t left = columns - column - v * L;
          T* const at = to + (units + unit) * columns + v * L;
          if (left <= 0) continue;
          const Vec<T> sum = load(sums[unit] + v * L);
          store_as<T, T>(at, first ? sum : load_as<T>(at, left) + sum, left);
        }
      }
    }
  }

  // packed[v][row]: columns of x or h_{t-1}, or of r * h_{t-1} where dn meets that; 0 in padding.
  void pack_rows(bool of_state, int64_t column, int64_t g, Range steps, T* packed) const {
    const int64_t columns = of_state ? p.H : p.C;
    for (int64_t s = steps.begin, row = 0; s < steps.end; s++) {
      const int64_t t = sequence.time(s);
      for (int64_t n = 0; n < p.N; n++, row++) {
        const bool live = sequence.live(t, n);
        const Storage* const from =
            of_state ? state_before(t, n) : static_cast<const Storage*>(a.x) + (t * p.N + n) * p.C;
        for (int64_t v = 0; v < COLUMNS; v++) {
          const int64_t at = column + v * L, left = columns - at;
          Vec<T> value = live && left > 0 ? load_as<T>(from + at, left) : Vec<T>{};
          if (of_state && g == 2 && !p.reset_after && live && left > 0) value *= load_as<T>(gate(t, n, 0) + at, left);
          store(packed + (v * rows + row) * L, value);
        }
      }
    }
  }

  // In several sums side by side: with one, biases had ten times the error of torch's, which adds in pairs.
  void bias_gradient(int64_t i, int64_t count) const {
    constexpr int SUMS = 8;
    const T* const from = panels + i * panel;
    for (int64_t begin = 0; begin < count; begin += RUN) {
      Vec<T> sums[SUMS] = {};
      for (int64_t row = begin; row < least(begin + RUN, count); row++) sums[row % SUMS] += load(from + row * L);
      for (int n = SUMS / 2; n > 0; n /= 2)
        for (int k = 0; k < n; k++) sums[k] += sums[k + n];
      store(db + i * L, load(db + i * L) + sums[0]);
    }
  }

  void finish(int64_t worker) const {
    const Range mine = part_of(p.N, team.size, worker);
    for (int64_t n = mine.begin; a.dh0 && n < mine.end; n++)
      narrow_row(dh + n * stride, p.H, static_cast<Storage*>(a.dh0) + n * p.H);
    if constexpr (!SAME) {
      const Range units = part_of(3 * p.H, team.size, worker);
      const auto narrow = [&](const T* from, void* to, int64_t columns) {
        const int64_t begin = units.begin * columns;
        if (to) copy_row(static_cast<Storage*>(to) + begin, from + begin, size(units) * columns);
      };
      narrow(dw_ih, a.dw_ih, p.C), narrow(dw_hh, a.dw_hh, p.H);
    }
    if (worker != 0) return;
    for (int64_t g = 0; g < 3; g++) {
      const int64_t hidden = g == 2 && p.reset_after ? int64_t(RESET_N) : g;
      if (a.db_ih) narrow_row(db + g * stride, p.H, static_cast<Storage*>(a.db_ih) + g * p.H);
      if (a.db_hh) narrow_row(db + hidden * stride, p.H, static_cast<Storage*>(a.db_hh) + g * p.H);
    }
  }

  static constexpr GruBwdKernel table = {memory_bytes, run};
};

}  // namespace

FASTARCH_EXPORT(GruBwdKernels, gru_bwd) = {
    {Backward<float>::table, Backward<double>::table, Backward<BFloat16>::table, Backward<Float16>::table}};
