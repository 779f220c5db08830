// Attention, backward: p again, from lse. One pass over tiles of keys gives dk and dv, and parts of dq, which a second
// pass adds in their order.
#include "cpu/attention_tile.h"

namespace {

template <class Storage>
struct Backward {
  using T = Compute<Storage>;
  static constexpr int64_t L = LANES<T>;

  // Scratch memory of a task.
  struct Memory {
    T *k_columns, *v_columns, *k, *dk, *dv, *q, *grad_o, *q_rows, *grad_o_rows, *scores, *dp, *capped, *factors;
    int64_t bytes;

    Memory(const Attention& p, void* scratch) {
      const int64_t width = padded<T>(p.D), width_v = padded<T>(p.Dv), square = QUERY_TILE * KEY_TILE;
      const int64_t converted = sizeof(T) == sizeof(Storage) ? 0 : QUERY_TILE;
      Scratch<T> from{static_cast<T*>(scratch)};
      k_columns = from.take(KEY_TILE * p.D), v_columns = from.take(KEY_TILE * p.Dv), k = from.take(KEY_TILE * width);
      dk = from.take(KEY_TILE * width), dv = from.take(KEY_TILE * width_v);
      q = from.take(QUERY_TILE * width), grad_o = from.take(QUERY_TILE * width_v);
      q_rows = from.take(converted * p.D), grad_o_rows = from.take(converted * p.Dv);
      scores = from.take(square), dp = from.take(square), capped = from.take(KEY_TILE), factors = from.take(KEY_TILE);
      bytes = from.used * sizeof(T);
    }
  };

  static int64_t scratch_bytes(const Attention& p) { return Memory(p, nullptr).bytes; }

  static const Storage* at(const void* data, const Heads& step, int64_t b, int64_t h, int64_t i) {
    return static_cast<const Storage*>(data) + b * step.b + h * step.h + i * step.i;
  }

  static void delta(const Attention& p, const AttentionGradients& g, AttentionTask task) {
    const Sequence of = sequence_of(p, task.b);
    const int64_t row = (of.memory_b * p.H + task.h) * p.Lq;
    for (int64_t i = of.q + task.begin; i < of.q + task.end; i++) {
      const Storage* o = at(g.o, p.o_at, of.memory_b, task.h, i);
      const Storage* grad_o = at(g.grad_o, g.grad_o_at, of.memory_b, task.h, i);
      Vec<T> sum = {};
      for (int64_t e = 0; e < p.Dv; e += L) sum += load_as<T>(o + e, p.Dv - e) * load_as<T>(grad_o + e, p.Dv - e);
      const T grad_lse = g.grad_lse ? static_cast<const T*>(g.grad_lse)[row + i] : T(0);
      static_cast<T*>(g.delta)[row + i] = across<T>(sum, [](Vec<T> a, Vec<T> b) { return a + b; }) - grad_lse;
    }
  }

  static void run(const Attention& p, const AttentionGradients& g, AttentionTask task, int64_t part, void* scratch) {
    const Sequence of = sequence_of(p, task.b);
    const Memory m(p, scratch);
    const int64_t width = padded<T>(p.D), width_v = padded<T>(p.Dv), heads = g.dq ? p.group : 0;
    for (int64_t h = task.h * p.group; h < task.h * p.group + heads; h++) {
      T* sums = sums_of(p, g, of, part, h);
      for (int64_t e = 0; e < of.queries * width; e += L) store(sums + e, Vec<T>{});
    }
    for (int64_t j = task.begin; j < task.end; j += KEY_TILE) {
      const Range tile{j, least(j + KEY_TILE, task.end)};
      const int64_t n = tile.end - j;
      const Storage* k = at(p.k, p.k_at, of.memory_b, task.h, of.k + j);
      const Storage* v = at(p.v, p.v_at, of.memory_b, task.h, of.k + j);
      pack_columns<T>(k, p.k_at.i, n, p.D, T(p.scale * LOG2_E), m.k_columns);
      pack_columns<T>(v, p.v_at.i, n, p.Dv, T(1), m.v_columns);
      if (g.dq) pack_rows<T>(k, p.k_at.i, n, p.D, m.k, KEY_TILE);
      for (int64_t e = 0; e < n * width; e += L) store(m.dk + e, Vec<T>{});
      for (int64_t e = 0; e < n * width_v; e += L) store(m.dv + e, Vec<T>{});
      for (int64_t h = task.h * p.group; h < (task.h + 1) * p.group; h++) {
        for (int64_t i = 0; i < of.queries; i += QUERY_TILE)
          add_tile(p, g, of, m, part, h, i, least(QUERY_TILE, of.queries - i), tile);
      }
      if (g.dk) store_rows(m.dk, width, n, p.D, T(p.scale), g.dk, g.dk_at, of.memory_b, task.h, of.k + j);
      if (g.dv) store_rows(m.dv, width_v, n, p.Dv, T(1), g.dv, g.dv_at, of.memory_b, task.h, of.k + j);
    }
  }

  static T* sums_of(const Attention& p, const AttentionGradients& g, const Sequence& of, int64_t part, int64_t h) {
    const int64_t batch = p.ends_q ? 1 : p.B;
    return static_cast<T*>(g.sums_q) + (((part * batch + of.memory_b) * p.H + h) * p.Lq + of.q) * padded<T>(p.D);
  }

  static void store_rows(T* rows, int64_t width, int64_t n, int64_t columns, T scale, void* to, const Heads& step,
                         int64_t b, int64_t h, int64_t i) {
    Storage* out = static_cast<Storage*>(to) + b * step.b + h * step.h + i * step.i;
    for (int64_t r = 0; r < n; r++, rows += width, out += step.i) {
      for (int64_t e = 0; e < width; e += L) store(rows + e, load(rows + e) * scale);
      copy_row(out, rows, columns);
    }
  }

  // Queries [i, i + n) of head h, keys of one tile.
  static void add_tile(const Attention& p, const AttentionGradients& g, const Sequence& of, const Memory& m,
                       int64_t part, int64_t h, int64_t i, int64_t n, Range tile) {
    const Range keys = reach_in_tile<T>(p, of, i, n, tile);
    if (keys.begin >= keys.end) return;
    const int64_t before = keys.begin - tile.begin, count = keys.end - keys.begin, vectors = vectors_of<T>(count);
    const int64_t width = padded<T>(p.D), width_v = padded<T>(p.Dv);
    const Storage* q = at(p.q, p.q_at, of.memory_b, h, of.q + i);
    const Storage* grad_o = at(g.grad_o, g.grad_o_at, of.memory_b, h, of.q + i);
    const Rows<T, Storage> q_rows(q, p.q_at.i, n, p.D, m.q_rows);
    const Rows<T, Storage> grad_o_rows(grad_o, g.grad_o_at.i, n, p.Dv, m.grad_o_rows);
    multiply<false>(false, n, p.D, q_rows.data, q_rows.step, m.k_columns + before * p.D, p.D * PANEL<T>, vectors,
                    m.scores, KEY_TILE);
    multiply<false>(false, n, p.Dv, grad_o_rows.data, grad_o_rows.step, m.v_columns + before * p.Dv, p.Dv * PANEL<T>,
                    vectors, m.dp, KEY_TILE);
    for (int64_t r = 0; r < n; r++)
      differentiate(p, g, of, m, h, i + r, keys, vectors, m.scores + r * KEY_TILE, m.dp + r * KEY_TILE);

    if (g.dv) {
      pack_rows<T>(grad_o, g.grad_o_at.i, n, p.Dv, m.grad_o, QUERY_TILE);
      multiply<true>(true, count, n, m.scores, KEY_TILE, m.grad_o, QUERY_TILE * PANEL<T>, vectors_of<T>(p.Dv),
                     m.dv + before * width_v, width_v);
    }
    if (g.dk) {
      pack_rows<T>(q, p.q_at.i, n, p.D, m.q, QUERY_TILE);
      multiply<true>(true, count, n, m.dp, KEY_TILE, m.q, QUERY_TILE * PANEL<T>, vectors_of<T>(p.D),
                     m.dk + before * width, width);
    }
    if (g.dq)
      multiply<false>(true, n, count, m.dp, KEY_TILE, m.k + before * PANEL<T>, KEY_TILE * PANEL<T>, vectors_of<T>(p.D),
                      sums_of(p, g, of, part, h) + i * width, width);
  }

  // Of query i: scores become p z, dp becomes the gradient of scale q.k.
  static void differentiate(const Attention& p, const AttentionGradients& g, const Sequence& of, const Memory& m,
                            int64_t h, int64_t i, Range keys, int64_t vectors, T* s, T* dp) {
    const int64_t row = (of.memory_b * p.H + h) * p.Lq + of.q + i, count = keys.end - keys.begin;
    if (modifies_scores(p))
      modify_scores<T, Storage>(p, of, h, i, keys.begin, vectors * L, s, p.softcap > 0 ? m.capped : nullptr);
    keep_reach(reach_of(p, of, i), keys.begin, vectors * L, s);
    const T given = static_cast<const T*>(g.lse)[row];
    const double in_log2 = given == -INFINITE<T> ? INFINITE<double> : given * LOG2_E;  // no keys: 2^(s - inf) is 0
    const T lse = T(in_log2), rest = in_log2 - lse == in_log2 - lse ? T(in_log2 - lse) : T(0);  // all of p errs by rest
    const T delta = static_cast<const T*>(g.delta)[row];
    const int64_t first = keys.begin / 64 * 64, skip = keys.begin - first;  // dropout has words of 64 keys
    if (p.dropout > 0) {
      dropout_factors(p, of, h, i, first, skip + count, m.factors);
      for (int64_t j = 0; j < count; j++) dp[j] *= m.factors[skip + j];
    }
    for (int64_t v = 0; v < vectors * L; v += L) {
      const Vec<T> weight = exp2<T>(load(s + v) - lse - rest);
      store(dp + v, weight * (load(dp + v) - delta)), store(s + v, weight);
    }
    if (p.dropout > 0) {
      for (int64_t j = 0; j < count; j++) s[j] *= m.factors[skip + j];
    }
    if (g.dmask) {
      T* dmask = static_cast<T*>(g.dmask) + row * p.Lk + keys.begin;
      for (int64_t j = 0; j < count; j++) dmask[j] = dp[j];
    }
    if (p.softcap > 0) {
      for (int64_t v = 0; v < vectors * L; v += L) {
        const Vec<T> t = load(m.capped + v);
        store(dp + v, load(dp + v) * (1 - t * t));
      }
    }
  }

  static void merge(const Attention& p, const AttentionGradients& g, AttentionTask task) {
    const Sequence of = sequence_of(p, task.b);
    const int64_t width = padded<T>(p.D);
    T* first = sums_of(p, g, of, 0, task.h) + task.begin * width;
    for (int64_t part = 1; part < g.parts; part++) {
      const T* other = sums_of(p, g, of, part, task.h) + task.begin * width;
      for (int64_t e = 0; e < (task.end - task.begin) * width; e += L)
        store(first + e, load(first + e) + load(other + e));
    }
    store_rows(first, width, task.end - task.begin, p.D, T(p.scale), g.dq, g.dq_at, of.memory_b, task.h,
               of.q + task.begin);
  }

  static constexpr AttentionBwd table = {scratch_bytes, padded<T>, delta, run, merge};
};

}  // namespace

FASTARCH_EXPORT(AttentionBwds, attention_bwd) = {
    {Backward<float>::table, Backward<double>::table, Backward<BFloat16>::table, Backward<Float16>::table}};
