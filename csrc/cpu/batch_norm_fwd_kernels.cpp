// batch_norm, forward: moments of parts, merged to mean and var, and the pass that normalises.
#include "cpu/batch_norm_unit.h"

namespace {

// Float sums are kept as short as so many elements of a plane, or rows, each around the mean of what came before.
constexpr int64_t PLANE_CHUNK = 4096, ROW_CHUNK = 128;

// A shift has to be finite: around an infinite mean everything is NaN, and torch's mean is infinite.
template <class T>
FASTARCH_INLINE T finite_or(T shift, T otherwise) {
  return shift - shift == 0 ? shift : otherwise;
}

// n values, their mean and the sum of squared deviations from it; merged as Chan, Golub and LeVeque 1983 do.
struct Moments {
  double n, mean, squares;

  FASTARCH_INLINE void merge(double m, double other_mean, double other_squares) {
    const double delta = other_mean - mean, total = n + m;
    mean = mean * (n / total) + other_mean * (m / total);  // infinite where one of them is
    squares += other_squares + delta * delta * (n * m / total);
    n = total;
  }
  // sums of x - shift and of its square, over m values
  FASTARCH_INLINE void merge_shifted(double m, double shift, double sum, double sum_of_squares) {
    merge(m, shift + sum / m, sum_of_squares - sum * sum / m);
  }
};

template <class Storage>
struct Forward {
  using T = Compute<Storage>;
  using U = Unit<T>;

  static int64_t constants_bytes(const BatchNorm& p) { return Channels<T>::bytes(p); }
  static int64_t scratch_bytes(const BatchNorm& p) { return p.rows ? 3 * ceil_div(p.C, UNIT) * UNIT * sizeof(T) : 0; }

  static void moments(const BatchNorm& p, const void* x, Range n, Range c, double* moments, void* scratch) {
    const Storage* at = static_cast<const Storage*>(x);
    if (p.rows) return moments_of_rows(p, at, n, c, moments, static_cast<T*>(scratch));
    moments_of_planes(p, at, n, c, moments);
  }

  // The sums of a chunk are taken around the mean of what came before it.
  static void moments_of_planes(const BatchNorm& p, const Storage* x, Range n, Range c, double* moments) {
    double *mean = moments, *deviations = moments + p.C;
    T shifts[CHANNELS_TOGETHER];
    for (int64_t channel = c.begin; channel < c.end; channel++) {
      shifts[channel - c.begin] = mean_of_first(x + (n.begin * p.C + channel) * p.S, least(p.S, 64));
      mean[channel] = deviations[channel] = 0;
    }
    const int64_t next = ahead(p);
    const auto add = [&](Sums<T>& sums, int64_t channel, int64_t at, int64_t m, int64_t) FASTARCH_INLINED {
      const Vec<T> shift = splat<T>(shifts[channel - c.begin]);
      prefetch(x + at, next);
      const U v = load_unit<T>(x + at, m);
      each_vector<T>([&](int i) FASTARCH_INLINED {
        Vec<T> d = v.v[i] - shift;
        if (m < UNIT) d = where_bits<T>((1u << m) - 1, i, d);
        sums.a.v[i] += d, sums.b.v[i] += d * d;
      });
    };
    const auto flush = [&](int64_t channel, int64_t before, int64_t count, double sum, double squares) {
      Moments m{double(before), mean[channel], deviations[channel]};
      m.merge_shifted(count, shifts[channel - c.begin], sum, squares);
      mean[channel] = m.mean, deviations[channel] = m.squares;
      shifts[channel - c.begin] = finite_or(T(m.mean), shifts[channel - c.begin]);
    };
    sum_planes<T, PLANE_CHUNK>(p, n, c, add, flush);
  }

  static T mean_of_first(const Storage* x, int64_t n) {
    T sum = 0;
    for (int64_t i = 0; i < n; i++) sum += Convert<T, Storage>::from(x[i]);
    return finite_or(sum / T(n), T(0));
  }

  static void moments_of_rows(const BatchNorm& p, const Storage* x, Range n, Range c, double* moments, T* scratch) {
    double *mean = moments, *deviations = moments + p.C;
    const int64_t stride = ceil_div(p.C, UNIT) * UNIT;
    T *shift = scratch, *sum = scratch + stride, *squares = scratch + 2 * stride;
    for (int64_t i = c.begin; i < c.end; i++) shift[i] = sum[i] = squares[i] = 0;
    const int64_t first = least(16, n.end - n.begin);
    add_rows(p, x, {n.begin, n.begin + first}, c, shift, sum, squares);
    for (int64_t i = c.begin; i < c.end; i++)
      shift[i] = finite_or(sum[i] / T(first), T(0)), mean[i] = deviations[i] = 0;

    for (int64_t begin = n.begin; begin < n.end; begin += ROW_CHUNK) {
      const Range chunk{begin, least(begin + ROW_CHUNK, n.end)};
      for (int64_t i = c.begin; i < c.end; i++) sum[i] = squares[i] = 0;
      add_rows(p, x, chunk, c, shift, sum, squares);
      for (int64_t i = c.begin; i < c.end; i++) {
        Moments m{double(begin - n.begin), mean[i], deviations[i]};
        m.merge_shifted(chunk.end - chunk.begin, shift[i], sum[i], squares[i]);
        mean[i] = m.mean, deviations[i] = m.squares, shift[i] = finite_or(T(m.mean), shift[i]);
      }
    }
  }

  // Adds the rows' x - shift and its square, channel by channel.
  static void add_rows(const BatchNorm& p, const Storage* x, Range n, Range c, const T* shift, T* sum, T* squares) {
    const int64_t next = ahead(p), together = rows_together(p);
    for (int64_t begin = n.begin; begin < n.end; begin += together) {
      const int64_t end = least(begin + together, n.end);
      each_unit(c.begin, c.end, [&](int64_t channel, int64_t m) FASTARCH_INLINED {
        const U k = load_unit<T>(shift + channel, UNIT);
        U s = load_unit<T>(sum + channel, UNIT), ss = load_unit<T>(squares + channel, UNIT);
        for (int64_t i = begin; i < end; i++) {
          const Storage* at = x + i * p.C + channel;
          prefetch(at, next);
          const U v = load_unit<T>(at, m);
          each_vector<T>([&](int j) FASTARCH_INLINED {
            const Vec<T> d = v.v[j] - k.v[j];
            s.v[j] += d, ss.v[j] += d * d;
          });
        }
        store_unit<T>(sum + channel, s, UNIT), store_unit<T>(squares + channel, ss, UNIT);
      });
    }
  }

  static void statistics(const BatchNorm& p, const double* moments, int64_t parts, Range c, void* mean, void* var) {
    for (int64_t i = c.begin; i < c.end; i++) {
      Moments total{};
      for (int64_t part = 0; part < parts; part++) {
        const Range n = part_of(p.N, parts, part);
        total.merge(double(n.end - n.begin) * p.S, moments[2 * part * p.C + i], moments[(2 * part + 1) * p.C + i]);
      }
      static_cast<T*>(mean)[i] = T(total.mean);
      static_cast<T*>(var)[i] = T(total.squares / total.n);
    }
  }

  static void constants(const BatchNorm& p, Affine affine, const void* mean, const void* var, Range c,
                        void* constants) {
    Channels<T>(p, constants).prepare(p, affine, mean, var, c);
  }

  static void apply(const BatchNorm& p, const void* x, const void* residual, const void* constants, void* y,
                    uint8_t* mask, Range n, Range c) {
    const Channels<T> channels(p, constants);
    const int64_t next = ahead(p);
    const bool streams = past_caches<T>(p, static_cast<const Storage*>(y));
    const auto run = [&](auto has_residual, auto relu, auto has_mask) {
      const auto unit = [&](const Coefficients<T>& k, int64_t at, int64_t m, int64_t byte) FASTARCH_INLINED {
        prefetch(static_cast<const Storage*>(x) + at, next);
        const U v = load_unit<T>(static_cast<const Storage*>(x) + at, m);
        U z, r = {};
        uint32_t passed = 0;
        if constexpr (has_residual.value) {
          prefetch(static_cast<const Storage*>(residual) + at, next);
          r = load_unit<T>(static_cast<const Storage*>(residual) + at, m);
        }
        each_vector<T>([&](int i) FASTARCH_INLINED {
          z.v[i] = normalised<T>(v.v[i], k.mean.v[i], k.scale.v[i], k.bias.v[i]);
          if constexpr (has_residual.value) z.v[i] += r.v[i];
          if constexpr (relu.value) {
            const Vec<IntOf<T>> pass = passes<T>(z.v[i]);
            if constexpr (has_mask.value) passed |= bits_of_lanes<T>(pass) << (i * LANES<T>);
            z.v[i] = (Vec<T>)((Vec<IntOf<T>>)z.v[i] & pass);
          }
        });
        if constexpr (has_mask.value) store_bits(mask + byte, passed, m);
        store_unit<T>(static_cast<Storage*>(y) + at, z, m, streams);
      };
      walk(p, channels, n, c, unit);
      if (streams) fence_streams();
    };
    constexpr Yes yes;
    constexpr No no;
    if (p.relu) {
      if (residual) return mask ? run(yes, yes, yes) : run(yes, yes, no);
      return mask ? run(no, yes, yes) : run(no, yes, no);
    }
    residual ? run(yes, no, no) : run(no, no, no);
  }

  static constexpr BatchNormFwd table = {scratch_bytes, moments, statistics, constants_bytes, constants, apply};
};

}  // namespace

FASTARCH_EXPORT(BatchNormFwds, batch_norm_fwd) = {
    {Forward<float>::table, Forward<double>::table, Forward<BFloat16>::table, Forward<Float16>::table}};
