// Attention, forward: o and lse of a range of queries, tile of keys by tile of keys, with a running maximum and sum.
#include "cpu/attention_tile.h"

namespace {

template <class Storage>
struct Forward {
  using T = Compute<Storage>;
  static constexpr int64_t L = LANES<T>;

  // As many as make packing a tile of keys cheap beside its products, while q and o stay in L2.
  static int64_t queries(const Attention& p) {
    constexpr int64_t BYTES = 256 << 10;
    return most(BYTES / int64_t(sizeof(T)) / (p.D + padded<T>(p.Dv)) / QUERY_TILE, 1) * QUERY_TILE;
  }

  // Scratch memory of a task.
  struct Memory {
    T *keys, *values, *scores, *factors, *top, *sum, *output, *q;
    int64_t bytes;

    Memory(const Attention& p, void* scratch) {
      const int64_t n = queries(p), width = padded<T>(p.Dv);
      Scratch<T> from{static_cast<T*>(scratch)};
      keys = from.take(KEY_TILE * p.D), values = from.take(KEY_TILE * width);
      scores = from.take(QUERY_TILE * KEY_TILE), factors = from.take(KEY_TILE);
      top = from.take(n), sum = from.take(n * L), output = from.take(n * width);
      q = from.take(sizeof(T) == sizeof(Storage) ? 0 : n * p.D);
      bytes = from.used * sizeof(T);
    }
  };

  static int64_t scratch_bytes(const Attention& p) { return Memory(p, nullptr).bytes; }

  static void run(const Attention& p, AttentionTask task, void* o, void* lse, void* scratch) {
    const Sequence of = sequence_of(p, task.b);
    const Memory m(p, scratch);
    const int64_t n = task.end - task.begin, head = task.h / p.group;
    const Storage* q_at = static_cast<const Storage*>(p.q) + of.memory_b * p.q_at.b + task.h * p.q_at.h;
    const Storage* k_at = static_cast<const Storage*>(p.k) + of.memory_b * p.k_at.b + head * p.k_at.h;
    const Storage* v_at = static_cast<const Storage*>(p.v) + of.memory_b * p.v_at.b + head * p.v_at.h;
    const Rows<T, Storage> q(q_at + (of.q + task.begin) * p.q_at.i, p.q_at.i, n, p.D, m.q);
    for (int64_t i = 0; i < n; i++) m.top[i] = -INFINITE<T>;
    for (int64_t e = 0; e < n * L; e += L) store(m.sum + e, Vec<T>{});

    const int64_t begin = reach_of(p, of, task.begin).begin, end = reach_of(p, of, task.end - 1).end;
    for (int64_t j = begin / KEY_TILE * KEY_TILE; j < end; j += KEY_TILE) {
      const Range tile{j, least(j + KEY_TILE, end)};
      pack_columns<T>(k_at + (of.k + j) * p.k_at.i, p.k_at.i, tile.end - j, p.D, T(p.scale * LOG2_E), m.keys);
      pack_rows<T>(v_at + (of.k + j) * p.v_at.i, p.v_at.i, tile.end - j, p.Dv, m.values, KEY_TILE);
      // While a row's softmax is computed, rows of the tiles that come next are on their way: 48 heads of 512x64, out
      // of cache, 134 -> 146 GFLOP/s on one core of a Xeon.
      const auto fetch_ahead = [&](int64_t r) FASTARCH_INLINED {
        if (r + QUERY_TILE < n) fetch(q.data + (r + QUERY_TILE) * q.step, p.D);
        if (r >= KEY_TILE || tile.end + r >= end) return;
        fetch(k_at + (of.k + tile.end + r) * p.k_at.i, p.D);
        fetch(v_at + (of.k + tile.end + r) * p.v_at.i, p.Dv);
      };
      for (int64_t i = 0; i < n; i += QUERY_TILE)
        add_tile(p, of, task, m, q, i, least(QUERY_TILE, n - i), tile, fetch_ahead);
    }
    finish(p, of, task, m, static_cast<Storage*>(o), static_cast<T*>(lse));
  }

  // Queries [i, i + n) of the task, keys of one tile.
  template <class FetchAhead>
  static void add_tile(const Attention& p, const Sequence& of, AttentionTask task, const Memory& m,
                       const Rows<T, Storage>& q, int64_t i, int64_t n, Range tile, const FetchAhead& fetch_ahead) {
    const Range keys = reach_in_tile<T>(p, of, task.begin + i, n, tile);
    if (keys.begin >= keys.end) return;
    const int64_t before = keys.begin - tile.begin, count = keys.end - keys.begin, vectors = vectors_of<T>(count);
    const int64_t width = padded<T>(p.Dv);
    const bool untouched = tile.begin <= reach_of(p, of, task.begin + i).begin;  // nothing is in their output yet
    multiply<false>(false, n, p.D, q.data + i * q.step, q.step, m.keys + before * p.D, p.D * PANEL<T>, vectors,
                    m.scores, KEY_TILE);
    const bool modifies = modifies_scores(p);
    for (int64_t r = i; r < i + n; r++) {
      T* s = m.scores + (r - i) * KEY_TILE;
      fetch_ahead(r);
      if (modifies) modify_scores<T, Storage>(p, of, task.h, task.begin + r, keys.begin, vectors * L, s, nullptr);
      keep_reach(reach_of(p, of, task.begin + r), keys.begin, vectors * L, s);
      softmax<T>(vectors, s, m.top[r], m.sum + r * L, m.output + r * width, untouched ? 0 : width);
      if (p.dropout > 0) {  // by words of 64 keys
        const int64_t first = keys.begin / 64 * 64, skip = keys.begin - first;
        dropout_factors(p, of, task.h, task.begin + r, first, skip + count, m.factors);
        for (int64_t j = 0; j < count; j++) s[j] *= m.factors[skip + j];
      }
    }
    multiply<false>(!untouched, n, count, m.scores, KEY_TILE, m.values + before * PANEL<T>, KEY_TILE * PANEL<T>,
                    vectors_of<T>(p.Dv), m.output + i * width, width);
  }

  static void finish(const Attention& p, const Sequence& of, AttentionTask task, const Memory& m, Storage* o, T* lse) {
    const int64_t width = padded<T>(p.Dv);
    o += of.memory_b * p.o_at.b + task.h * p.o_at.h;
    lse += (of.memory_b * p.H + task.h) * p.Lq;
    for (int64_t r = 0; r < task.end - task.begin; r++) {
      const int64_t i = of.q + task.begin + r;
      const T sum = across<T>(load(m.sum + r * L), [](Vec<T> a, Vec<T> b) { return a + b; });
      T* row = m.output + r * width;
      const T inverse = 1 / sum;
      for (int64_t e = 0; e < width; e += L) store(row + e, sum == 0 ? Vec<T>{} : load(row + e) * inverse);
      copy_row(o + i * p.o_at.i, row, p.Dv);
      lse[i] = sum == 0 ? -INFINITE<T> : T(m.top[r] * LN_2 + __builtin_log(double(sum)));
    }
  }

  static constexpr AttentionFwd table = {queries, scratch_bytes, run};
};

}  // namespace

FASTARCH_EXPORT(AttentionFwds, attention_fwd) = {
    {Forward<float>::table, Forward<double>::table, Forward<BFloat16>::table, Forward<Float16>::table}};
