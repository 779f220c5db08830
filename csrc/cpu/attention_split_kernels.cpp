// Attention of few queries, forward: every key and value is read once, where it is, for all queries of its head.
#include "cpu/attention_tile.h"

namespace {

template <class Storage>
struct Split {
  using T = Compute<Storage>;
  static constexpr int64_t L = LANES<T>;

  static int64_t rows(const Attention& p) { return p.group * p.Lq; }

  // Partial results of a head: output [rows][padded(Dv)], then the running sum [rows][L] and maximum [rows].
  struct Partial {
    T *output, *sum, *top;
    int64_t elements;

    Partial(const Attention& p, void* memory) {
      Scratch<T> from{static_cast<T*>(memory)};
      output = from.take(rows(p) * padded<T>(p.Dv)), sum = from.take(rows(p) * L), top = from.take(rows(p));
      elements = from.used;
    }
  };

  static int64_t partial_elements(const Attention& p) { return Partial(p, nullptr).elements; }

  static int64_t scratch_bytes(const Attention& p) {
    return rows(p) * (padded<T>(p.D) + KEY_TILE) * int64_t(sizeof(T));  // queries, scores
  }

  static void run(const Attention& p, AttentionTask task, void* memory, void* scratch) {
    const Sequence of = sequence_of(p, task.b);
    const Partial part(p, memory);
    const int64_t width = padded<T>(p.D), width_v = padded<T>(p.Dv), n = rows(p);
    T *q = static_cast<T*>(scratch), *scores = q + n * width;
    for (int64_t r = 0; r < n; r++) {
      const int64_t h = task.h * p.group + r / p.Lq;
      T* row = q + r * width;
      copy_row(row, static_cast<const Storage*>(p.q) + task.b * p.q_at.b + h * p.q_at.h + r % p.Lq * p.q_at.i, p.D);
      for (int64_t e = 0; e < p.D; e++) row[e] *= T(p.scale * LOG2_E);
      for (int64_t e = p.D; e < width; e++) row[e] = 0;
      part.top[r] = -INFINITE<T>;
      store(part.sum + r * L, Vec<T>{});
    }
    for (int64_t e = 0; e < n * width_v; e += L) store(part.output + e, Vec<T>{});

    const Storage* k = static_cast<const Storage*>(p.k) + task.b * p.k_at.b + task.h * p.k_at.h;
    const Storage* v = static_cast<const Storage*>(p.v) + task.b * p.v_at.b + task.h * p.v_at.h;
    for (int64_t j = task.begin; j < task.end; j += KEY_TILE) {
      const Range keys = reach_in_tile<T>(p, of, 0, p.Lq, {j, least(j + KEY_TILE, task.end)});
      if (keys.begin >= keys.end) continue;
      const int64_t count = keys.end - keys.begin, vectors = vectors_of<T>(count);
      for (int64_t g = 0; g < vectors; g++) {
        const Storage* group = k + (keys.begin + g * L) * p.k_at.i;
        for (int64_t r = 0; r < n; r++)
          store(scores + r * KEY_TILE + g * L, scores_of(p, group, least(L, count - g * L), q + r * width));
      }
      for (int64_t r = 0; r < n; r++) {
        const int64_t h = task.h * p.group + r / p.Lq, i = r % p.Lq;
        T* s = scores + r * KEY_TILE;
        if (modifies_scores(p)) modify_scores<T, Storage>(p, of, h, i, keys.begin, vectors * L, s, nullptr);
        keep_reach(reach_of(p, of, i), keys.begin, vectors * L, s);
        softmax<T>(vectors, s, part.top[r], part.sum + r * L, part.output + r * width_v, width_v);
        add_values(p, v + keys.begin * p.v_at.i, count, s, part.output + r * width_v);
      }
    }
  }

  // One query's scores with n <= L keys: sums lane by lane, which a transpose puts side by side.
  static FASTARCH_INLINE Vec<T> scores_of(const Attention& p, const Storage* k, int64_t n, const T* q) {
    Vec<T> sums[L] = {};
    if (n == L && p.D % L == 0) {
      for (int64_t e = 0; e < p.D; e += L) {
        const Vec<T> factor = load(q + e);
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; j++) sums[j] += factor * load_as<T>(k + j * p.k_at.i + e, L);
      }
    } else {
      for (int64_t e = 0; e < p.D; e += L) {
        for (int64_t j = 0; j < n; j++) sums[j] += load(q + e) * load_as<T>(k + j * p.k_at.i + e, p.D - e);
      }
    }
    transpose<T>(sums);
    Vec<T> sum = sums[0];
#pragma GCC unroll 16
    for (int64_t j = 1; j < L; j++) sum += sums[j];
    return sum;
  }

  static void add_values(const Attention& p, const Storage* v, int64_t n, const T* weights, T* output) {
    constexpr int64_t TOGETHER = 8;
    for (int64_t e = 0; e < p.Dv; e += TOGETHER * L) {
      const int64_t m = vectors_of<T>(least(TOGETHER * L, p.Dv - e));
      Vec<T> acc[TOGETHER] = {};
      if (m == TOGETHER && p.Dv - e >= TOGETHER * L) {
        for (int64_t j = 0; j < n; j++) {
#pragma GCC unroll 8
          for (int64_t c = 0; c < TOGETHER; c++) acc[c] += load_as<T>(v + j * p.v_at.i + e + c * L, L) * weights[j];
        }
      } else {
        for (int64_t j = 0; j < n; j++) {
          for (int64_t c = 0; c < m; c++)
            acc[c] += load_as<T>(v + j * p.v_at.i + e + c * L, p.Dv - e - c * L) * weights[j];
        }
      }
      for (int64_t c = 0; c < m; c++) store(output + e + c * L, load(output + e + c * L) + acc[c]);
    }
  }

  // With the largest maximum, every part scaled to it: a part without keys has a maximum of -inf and adds nothing.
  static void merge(const Attention& p, int64_t b, int64_t head, void* memory, int64_t parts, void* o, void* lse) {
    const int64_t width = padded<T>(p.Dv), elements = partial_elements(p);
    const Partial first(p, memory);
    for (int64_t r = 0; r < rows(p); r++) {
      T top = first.top[r];
      for (int64_t i = 1; i < parts; i++) {
        const T other = Partial(p, static_cast<T*>(memory) + i * elements).top[r];
        top = other > top ? other : top;
      }
      T* row = first.output + r * width;
      T total = 0;
      for (int64_t i = 0; i < parts; i++) {
        const Partial part(p, static_cast<T*>(memory) + i * elements);
        const T down = part.top[r] == -INFINITE<T> ? T(0) : exp2<T>(splat<T>(part.top[r] - top))[0];
        total += down * across<T>(load(part.sum + r * L), [](Vec<T> x, Vec<T> y) { return x + y; });
        for (int64_t e = 0; e < width; e += L) {
          const Vec<T> scaled = load(part.output + r * width + e) * down;
          store(row + e, i ? load(row + e) + scaled : scaled);
        }
      }
      const int64_t h = head * p.group + r / p.Lq, i = r % p.Lq;
      const T inverse = total == 0 ? T(0) : 1 / total;
      for (int64_t e = 0; e < width; e += L) store(row + e, load(row + e) * inverse);
      copy_row(static_cast<Storage*>(o) + b * p.o_at.b + h * p.o_at.h + i * p.o_at.i, row, p.Dv);
      static_cast<T*>(lse)[(b * p.H + h) * p.Lq + i] =
          total == 0 ? -INFINITE<T> : T(top * LN_2 + __builtin_log(double(total)));
    }
  }

  static constexpr AttentionSplit table = {partial_elements, scratch_bytes, run, merge};
};

}  // namespace

FASTARCH_EXPORT(AttentionSplits, attention_split) = {
    {Split<float>::table, Split<double>::table, Split<BFloat16>::table, Split<Float16>::table}};
