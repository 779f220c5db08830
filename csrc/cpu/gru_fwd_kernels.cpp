// gru, forward: the input's share of all gates as one product over a chunk of steps, then step by step the state's,
// with the gates computed while the sums are in the L1 cache. Weights are packed for that, unless there is but one
// step.
#include "cpu/activation.h"
#include "cpu/gru_once.h"

namespace {

template <class Storage>
struct Forward {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;
  static constexpr bool SAME = sizeof(T) == sizeof(Storage);
  static constexpr int64_t CHUNK_BYTES = 256 << 10;  // of sums of the input: they wait in the L2 cache for their steps
  alignas(64) static constexpr T ZEROS[MOST_VECTORS * L] = {};

  const Gru p;
  const GruFwd a;
  const Team team;
  const Sequence sequence{p};
  const int64_t blocks = ceil_div(p.H, L), stride = blocks * L;  // vectors of units; from row to row of a state
  const int64_t G = p.reset_after ? 4 : 3;
  const bool packs = !serves_once(p, team);
  const int phases = p.reset_after ? 1 : packs ? 2 : 3;  // of a step
  const Once<Storage> once{p.N};

  // rows and blocks that a worker has at most, and steps whose sums it keeps
  const int64_t own_rows = team.split == Split::ROWS ? ceil_div(p.N, team.size) : p.N;
  const int64_t own_blocks = team.split == Split::UNITS ? ceil_div(blocks, team.size) : blocks;
  const int64_t chunk = least(p.T, CHUNK_BYTES / int64_t(own_rows * own_blocks * 3 * L * sizeof(T)) + 1);
  const int64_t sums_size = chunk * own_rows * own_blocks * 3 * L;

  T *w_ih, *w_hh, *bias, *bias_n;  // panels [blocks][3][K][L] (w_hh without reset_after: of r and z, then of n)
  T *state[2], *reset, *update;    // [N][stride]: h before and after a step; r * h and z, without reset_after
  T *sums, *x;                     // of each worker: [chunk][rows][blocks][3][L]; [chunk][rows][C] where it is widened
  T *operands[2], *products, *scratch;  // of Once: x and the state; of each worker: [N][gates][L], and its own

  Forward(const Gru& p, const GruFwd& a, const Team& team, Memory& m) : p(p), a(a), team(team) {
    w_ih = m.take<T>(packs * blocks * 3 * p.C * L), w_hh = m.take<T>(packs * blocks * 3 * p.H * L);
    bias = m.take<T>(blocks * 3 * L), bias_n = m.take<T>(blocks * L);
    for (T*& s : state) s = m.take<T>(p.N * stride);
    reset = m.take<T>(p.reset_after ? 0 : p.N * stride), update = m.take<T>(p.reset_after ? 0 : p.N * stride);
    sums = m.take<T>(team.size * sums_size);
    x = m.take<T>(SAME || !packs ? 0 : team.size * chunk * own_rows * p.C);
    operands[0] = m.take<T>(packs ? 0 : once.operand_size(p.C));
    operands[1] = m.take<T>(packs ? 0 : once.operand_size(p.H));
    products = m.take<T>(packs ? 0 : team.size * p.N * 3 * L);
    scratch = m.take<T>(packs ? 0 : team.size * once.scratch_size());
  }

  static int64_t memory_bytes(const Gru& p, const Team& team) {
    Memory counted{};
    Forward(p, {}, team, counted);
    return counted.at;
  }

  static void run(const Gru& p, const GruFwd& a, const Team& team, void* memory) {
    Memory m{reinterpret_cast<uintptr_t>(memory)};
    Forward(p, a, team, m).run();
  }

  void run() const {
    each_worker(team, [&](int64_t worker) {
      const Range mine = part_of(blocks, team.size, worker), rows = part_of(p.N, team.size, worker);
      for (int64_t j = mine.begin; j < mine.end; j++) pack(j);
      for (int64_t n = rows.begin; n < rows.end; n++)
        widen_row(static_cast<const Storage*>(a.h0) + n * p.H, p.H, state[0] + n * stride);
      if (packs) return;
      once.prepare(static_cast<const Storage*>(a.x), p.C, p.C, operands[0], team, worker);
      once.prepare(static_cast<const Storage*>(a.h0), p.H, p.H, operands[1], team, worker);
    });
    for (int64_t begin = 0; begin < p.T; begin += chunk) {
      const Range steps{begin, least(begin + chunk, p.T)};
      walk(team, p.N, blocks, size(steps), phases, [&](int phase, int64_t worker, Range rows, Range units, int64_t i) {
        T* const mine = sums + worker * sums_size;
        if (!packs) return step_once(phase, worker, units, mine);
        if (phase == 0 && i == 0) project(rows, units, steps, mine, x + worker * chunk * own_rows * p.C);
        step(phase, rows, units, begin + i, mine + i * size(rows) * size(units) * 3 * L);
      });
    }
    each_worker(team, [&](int64_t worker) {
      const Range rows = part_of(p.N, team.size, worker);
      for (int64_t n = rows.begin; n < rows.end; n++)
        narrow_row(state[p.T % 2] + n * stride, p.H, static_cast<Storage*>(a.h_n) + n * p.H);
    });
  }

  void pack(int64_t j) const {
    const int64_t live = least(L, p.H - j * L);
    for (int64_t g = 0; g < 3; g++) {
      const int64_t unit = g * p.H + j * L;
      if (packs) {
        pack_panel(row(a.w_ih, unit, p.C), p.C, p.C, live, w_ih + (3 * j + g) * p.C * L);
        pack_panel(row(a.w_hh, unit, p.H), p.H, p.H, live, recurrent(j, g));
      }
      const auto of = [&](const void* b) {
        return b ? load_as<T>(static_cast<const Storage*>(b) + unit, live) : Vec<T>{};
      };
      const bool apart = g == 2 && p.reset_after;  // r multiplies this one
      store(bias + (3 * j + g) * L, apart ? of(a.b_ih) : of(a.b_ih) + of(a.b_hh));
      if (apart) store(bias_n + j * L, of(a.b_hh));
    }
  }

  static const Storage* row(const void* w, int64_t unit, int64_t K) {
    return static_cast<const Storage*>(w) + unit * K;
  }

  // The panel of gate g. Panels that a product takes together lie together.
  T* recurrent(int64_t j, int64_t g) const {
    const int64_t panel = p.H * L;
    if (p.reset_after) return w_hh + (3 * j + g) * panel;
    return w_hh + (g < 2 ? 2 * j + g : 2 * blocks + j) * panel;
  }

  // sums[s][n][j][g] = W x + b, of the rows and blocks of one worker.
  void project(Range rows, Range units, Range steps, T* sums, T* widened) const {
    const int64_t R = size(rows), row_step = size(units) * 3 * L;
    const auto offset = [&](int64_t q) {
      return (sequence.time(steps.begin + q / R) * p.N + rows.begin + q % R) * p.C;
    };
    const Range all{0, R * size(steps)};
    if constexpr (!SAME) {
      for (int64_t q = 0; q < all.end; q++)
        copy_row(widened + q * p.C, static_cast<const Storage*>(a.x) + offset(q), p.C);
    }
    for (int64_t j = units.begin; j < units.end; j++) {
      Product<T> o;
      o.x = SAME ? static_cast<const T*>(a.x) : widened;
      o.w = w_ih + 3 * j * p.C * L, o.w_step = p.C * L, o.length = p.C;
      o.init = bias + 3 * j * L, o.to_step = row_step;
      each_strip(all, [&](int64_t q, int64_t rows) {
        o.rows = rows, o.to = sums + q * row_step + (j - units.begin) * 3 * L;
        for (int64_t i = 0; i < rows; i++) o.at[i] = SAME ? offset(q + i) : (q + i) * p.C;
        multiply(3, o);
      });
    }
  }

  // One step of some rows and blocks. With reset_after it is phase 0; otherwise phase 0 gives r * h and z, phase 1 h.
  void step(int phase, Range rows, Range units, int64_t s, const T* sums) const {
    const int64_t V = p.reset_after ? 3 : phase == 0 ? 2 : 1;  // gates that it multiplies
    const int64_t row_step = size(units) * 3 * L;
    each_group(are_few(size(rows)) ? 2 : 1, units, [&](int64_t j, int64_t B) {
      alignas(64) T products[STRIP_ROWS * 3 * L];
      Product<T> o;
      o.x = phase == 0 ? state[s % 2] : reset, o.length = p.H;
      o.w = recurrent(j, phase == 0 ? 0 : 2), o.w_step = p.H * L;
      o.init = ZEROS, o.to = products, o.to_step = B * V * L;
      each_strip(rows, [&](int64_t n, int64_t count) {
        const Rows some = live_rows(s, n, count);
        o.rows = some.live;
        for (int64_t i = 0; i < some.live; i++) o.at[i] = some.n[i] * stride;
        multiply(B * V, o);
        const auto terms = [&](int64_t b) FASTARCH_INLINED {
          const T* const input = sums + (j + b - units.begin) * 3 * L - rows.begin * row_step;
          return Terms{input, row_step, products + b * V * L, B * V * L};
        };
        for (int64_t b = 0; V > 1 && b < B; b++) reset_and_update(place(s, j + b), some, terms(b), p.reset_after);
        for (int64_t b = 0; V != 2 && b < B; b++) finish(place(s, j + b), some, terms(b), p.reset_after);
      });
    });
  }

  // The only step, of all rows and some blocks: phase 0 and, without reset_after, 2; between them r * h is prepared.
  void step_once(int phase, int64_t worker, Range units, T* sums) const {
    if (phase == 1) return once.prepare(reset, stride, p.H, operands[1], team, worker);
    const int64_t V = p.reset_after ? 3 : phase == 0 ? 2 : 1, first = phase == 0 ? 0 : 2;
    T *const product = products + worker * p.N * 3 * L, *const own = scratch + worker * once.scratch_size();
    for (int64_t j = units.begin; j < units.end; j++) {
      const int64_t live = least(L, p.H - j * L);
      const Storage *const w_x = row(a.w_ih, j * L, p.C), *const w_h = row(a.w_hh, first * p.H + j * L, p.H);
      T* const input = sums + (j - units.begin) * p.N * 3 * L;
      if (phase == 0) once.multiply_all(operands[0], w_x, p.H * p.C, live, 3, p.C, bias + 3 * j * L, input, 3 * L, own);
      once.multiply_all(operands[1], w_h, p.H * p.H, live, V, p.H, ZEROS, product, V * L, own);
      each_strip({0, p.N}, [&](int64_t n, int64_t count) {
        Rows some = live_rows(0, n, count);
        memcpy(some.product, some.n, sizeof some.n);  // those past their end have products here
        const Terms terms{input, 3 * L, product, V * L};
        if (V > 1) reset_and_update(place(0, j), some, terms, p.reset_after);
        if (V != 2) finish(place(0, j), some, terms, p.reset_after);
      });
    }
  }

  // Rows n of a strip, first those that are not past their end, and which row of products each has.
  struct Rows {
    int64_t live, count, n[STRIP_ROWS], product[STRIP_ROWS];
  };
  FASTARCH_INLINE Rows live_rows(int64_t s, int64_t first, int64_t count) const {
    const int64_t t = sequence.time(s);
    Rows rows;
    rows.live = 0, rows.count = count;
    int64_t past = count;
    for (int64_t n = first; n < first + count; n++) rows.n[sequence.live(t, n) ? rows.live++ : --past] = n;
    for (int64_t i = 0; i < count; i++) rows.product[i] = i;
    return rows;
  }

  // Where one step of one block of units is: rows n of the states, [stride] apart, of output, [H], and gates, [G][H].
  struct Place {
    int64_t left, stride, H, G;
    const T *before, *bias;
    T *after, *reset, *update;
    Storage *output, *gates;  // null where they are not saved

    FASTARCH_INLINE void save(int64_t n, int64_t g, Vec<T> value) const {
      store_as<Storage, T>(gates + (n * G + g) * H, value, left);
    }
  };
  FASTARCH_INLINE Place place(int64_t s, int64_t j) const {
    const int64_t at = j * L, t = sequence.time(s) * p.N;
    Place to;
    to.left = p.H - at, to.stride = stride, to.H = p.H, to.G = G;
    to.before = state[s % 2] + at, to.after = state[(s + 1) % 2] + at;
    to.bias = bias_n + at, to.reset = reset + at, to.update = update + at;
    to.output = static_cast<Storage*>(a.output) + t * p.H + at;
    to.gates = a.gates ? static_cast<Storage*>(a.gates) + t * G * p.H + at : nullptr;
    return to;
  }

  // What gates are made of: rows of the input's share and of products.
  struct Terms {
    const T* input;
    int64_t input_step;
    T* product;
    int64_t product_step;
  };

  // r and z instead of their products; without reset_after it is r * h and z, for phase 1. All rows have theirs before
  // the first uses it: a core looks ahead over one or two rows, and would wait for their chains (64 rows of 64 units on
  // one core of a Zen 3: 4.6 -> 4.0 ms, 32 of 256: 31.8 -> 30.5).
  FASTARCH_INLINE static void reset_and_update(Place to, const Rows& rows, Terms from, bool reset_after) {
    for (int64_t i = 0; i < rows.live; i++) {
      const int64_t n = rows.n[i];
      const T* const input = from.input + n * from.input_step;
      T* const product = from.product + rows.product[i] * from.product_step;
      const Vec<T> r = sigmoid<T>(load(input) + load(product)), z = sigmoid<T>(load(input + L) + load(product + L));
      if (reset_after) {
        store(product, r), store(product + L, z);
      } else {
        store(to.reset + n * to.stride, r * load(to.before + n * to.stride)), store(to.update + n * to.stride, z);
      }
      if (to.gates) to.save(n, 0, r), to.save(n, 1, z);
    }
  }

  // The candidate n and h' = (1 - z) * n + z * h.
  FASTARCH_INLINE static void finish(Place to, const Rows& rows, Terms from, bool reset_after) {
    for (int64_t i = 0; i < rows.live; i++) {
      const int64_t n = rows.n[i];
      const T* const input = from.input + n * from.input_step;
      const T* const product = from.product + rows.product[i] * from.product_step;
      Vec<T> z, sum = load(input + 2 * L);
      if (reset_after) {
        const Vec<T> a_n = load(to.bias) + load(product + 2 * L);
        if (to.gates) to.save(n, 3, a_n);
        z = load(product + L), sum += load(product) * a_n;
      } else {
        z = load(to.update + n * to.stride), sum += load(product);
      }
      const Vec<T> candidate = tanh<T>(sum);
      if (to.gates) to.save(n, 2, candidate);
      const Vec<T> next = (T(1) - z) * candidate + z * load(to.before + n * to.stride);
      store(to.after + n * to.stride, next);
      store_as<Storage, T>(to.output + n * to.H, next, to.left);
    }
    for (int64_t i = rows.live; i < rows.count; i++) {
      const int64_t n = rows.n[i];
      store(to.after + n * to.stride, load(to.before + n * to.stride));
      store_as<Storage, T>(to.output + n * to.H, Vec<T>{}, to.left);
    }
  }

  static constexpr GruFwdKernel table = {memory_bytes, run};
};

}  // namespace

FASTARCH_EXPORT(GruFwdKernels, gru_fwd) = {
    {Forward<float>::table, Forward<double>::table, Forward<BFloat16>::table, Forward<Float16>::table}};
