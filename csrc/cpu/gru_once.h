// Products of gru with weights as they stand, for a sequence of one step, which has no second use for packed ones. On
// one core of a Xeon, of 256 features and 512 units: 1 row 740 us -> 305, 8 rows 683 -> 361, 64 rows 1861 -> 1584.
#pragma once

#include "cpu/gru_tile.h"

namespace {

// Rows beyond which packing pays: 128 took 3288 us packed and 3074 as they stand, 256 took 6220 and 7364.
FASTARCH_INLINE bool serves_once(const Gru& p, const Team& team) {
  constexpr int64_t MOST_ROWS = 128;
  return p.T == 1 && p.N <= MOST_ROWS && (team.size == 1 || team.split == Split::UNITS);
}

// Rows x [N, K] against weights [.., K]. Vectors go across the batch: rows of x lie in panels [K][L], and weights are
// broadcast. Where that would leave many lanes empty, they go along K.
template <class Storage>
struct Once {
  using T = Compute<Storage>;
  static constexpr int L = LANES<T>;

  const int64_t N;
  const bool across = 4 * N > 3 * L;
  const int64_t vectors = ceil_div(N, L), width = vectors * L;  // of the batch

  FASTARCH_INLINE static int64_t padded(int64_t K) { return ceil_div(K, L) * L; }
  int64_t operand_size(int64_t K) const { return across ? width * K : N * padded(K); }
  int64_t scratch_size() const { return across ? 3 * L * width + TILE_ROWS * RUN : N * L * L; }

  // A worker's part of the operand of rows a step apart.
  template <class From>
  void prepare(const From* x, int64_t step, int64_t K, T* operand, const Team& team, int64_t worker) const {
    const Range mine = part_of(across ? vectors : N, team.size, worker);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      if (across) {
        pack_panel(x + i * L * step, step, K, least(L, N - i * L), operand + i * K * L);
      } else {
        widen_row(x + i * step, K, operand + i * padded(K));
      }
    }
  }

  // to[n][g][l] = init[g][l] + sum_k x[n][k] w[g][l][k] for `gates` g, whose rows w, of which `live` exist, begin
  // w_step apart.
  void multiply_all(const T* operand, const Storage* w, int64_t w_step, int64_t live, int64_t gates, int64_t K,
                    const T* init, T* to, int64_t to_step, T* scratch) const {
    if (across) {
      multiply_across(operand, w, w_step, live, gates, K, init, to, to_step, scratch);
    } else {
      for (int64_t g = 0; g < gates; g++)
        multiply_along(operand, w + g * w_step, live, K, init + g * L, to + g * L, to_step, scratch);
    }
  }

 private:
  // Weights of some rows lie together while they are used: rows 4 KB apart would share one set of the L1 cache.
  void multiply_across(const T* operand, const Storage* w, int64_t w_step, int64_t live, int64_t gates, int64_t K,
                       const T* init, T* to, int64_t to_step, T* sums) const {
    T* const weights = sums + 3 * L * width;  // [TILE_ROWS][RUN]
    Product<T> o;
    o.x = weights, o.w_step = K * L, o.init_step = o.to_step = width;
    for (int64_t i = 0; i < TILE_ROWS; i++) o.at[i] = i * RUN;
    for (int64_t q = 0; q < gates * L; q++)
      for (int64_t v = 0; v < vectors; v++) store(sums + q * width + v * L, splat<T>(init[q]));
    for (int64_t g = 0; g < gates; g++) {
      each_tile({0, live}, [&](int64_t l, int64_t rows) {
        for (int64_t begin = 0; begin < K; begin += RUN) {
          o.rows = rows, o.length = least(RUN, K - begin);
          const Storage* const from = w + g * w_step + l * K + begin;
          for (int64_t i = 0; i < rows; i++) copy_row(weights + i * RUN, from + i * K, o.length);
          // those that come next are on their way while these are used: some 3 % of a step of 64 rows
          const Storage* const next = begin + RUN < K ? from + RUN : from - begin + rows * K;
          for (int64_t i = 0; i < rows; i++) fetch(next + i * K, RUN);
          each_group(balanced_rows(vectors, 3), {0, vectors}, [&](int64_t v, int64_t together) {
            o.w = operand + (v * K + begin) * L;
            o.init = o.to = sums + (g * L + l) * width + v * L;
            multiply(together, o);
          });
        }
      });
    }
    copy_block(to, {to_step, 1}, sums, {1, width}, N, gates * L);
  }

  // For one gate; partial sums [N][L][L] of all its rows are added up together.
  void multiply_along(const T* operand, const Storage* w, int64_t live, int64_t K, const T* init, T* to,
                      int64_t to_step, T* partial) const {
    for (int64_t l = 0; l < L; l++) {
      each_tile({0, N}, [&](int64_t n, int64_t rows) {
        T* const sums = partial + (n * L + l) * L;
        dots(rows, operand + n * padded(K), w + l * K, l < live ? K : 0, padded(K), sums);
      });
    }
    for (int64_t n = 0; n < N; n++) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) v[l] = load(partial + (n * L + l) * L);
      transpose<T>(v);
      Vec<T> sum = load(init);
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) sum += v[l];
      store(to + n * to_step, sum);
    }
  }

  // sums[i * L * L ..] = x[i][k] w[k], summed over k a vector apart.
  template <int P = TILE_ROWS>
  static void dots(int64_t rows, const T* x, const Storage* w, int64_t K, int64_t x_step, T* sums) {
    if constexpr (P > 1) {
      if (rows < P) return dots<P - 1>(rows, x, w, K, x_step, sums);
    }
    Vec<T> even[P] = {}, odd[P] = {};  // one sum alone would wait for itself
    const auto add = [&](Vec<T>(&acc)[P], int64_t k) FASTARCH_INLINED {
      const Vec<T> weights = load_as<T>(w + k, K - k);
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) acc[p] += load(x + p * x_step + k) * weights;
    };
    int64_t k = 0;
    for (; k + L < K; k += 2 * L) add(even, k), add(odd, k + L);
    if (k < K) add(even, k);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) store(sums + p * L * L, even[p] + odd[p]);
  }
};

}  // namespace
