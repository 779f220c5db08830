// batch_norm, backward: sums of parts, merged to the gradients of weight and bias, and the pass that writes dx.
#include "cpu/batch_norm_unit.h"

namespace {

// Float sums are kept as short as so many elements of a plane, or rows; they are added in double.
constexpr int64_t PLANE_CHUNK = 1024, ROW_CHUNK = 32;

enum class Relu { NONE, MASK, RECOMPUTE };

template <class Storage>
struct Backward {
  using T = Compute<Storage>;
  using U = Unit<T>;

  static int64_t constants_bytes(const BatchNorm& p) { return Channels<T>::bytes(p); }
  static int64_t scratch_bytes(const BatchNorm& p) { return p.rows ? 2 * ceil_div(p.C, UNIT) * UNIT * sizeof(T) : 0; }

  static void constants(const BatchNorm& p, Affine affine, const void* mean, const void* var, Range c,
                        void* constants) {
    Channels<T>(p, constants).prepare(p, affine, mean, var, c);
  }

  static void means(const BatchNorm& p, const void* var, const void* mean_dz, const void* mean_dz_xhat, Range c,
                    void* constants) {
    const T *dz = static_cast<const T*>(mean_dz), *dz_xhat = static_cast<const T*>(mean_dz_xhat);
    for (int64_t i = c.begin; i < c.end; i++)
      centre(Channels<T>(p, constants), i, rstd(p, static_cast<const T*>(var)[i]), dz[i], dz_xhat[i]);
  }

  static void centre(const Channels<T>& k, int64_t channel, double rstd, double mean_dz, double mean_dz_xhat) {
    k.slope[channel] = T(-k.scale[channel] * rstd * mean_dz_xhat);
    k.offset[channel] = T(-k.scale[channel] * mean_dz);
  }

  // Calls run with the way that ReLU's mask is found, as a constant.
  template <class Run>
  static FASTARCH_INLINE void with_relu(const BatchNorm& p, const uint8_t* mask, const Run& run) {
    if (!p.relu) return run(Known<Relu, Relu::NONE>{});
    mask ? run(Known<Relu, Relu::MASK>{}) : run(Known<Relu, Relu::RECOMPUTE>{});
  }

  // dz of vector i of a unit: dy where ReLU passed.
  template <Relu RELU>
  static FASTARCH_INLINE Vec<T> through_relu(const Coefficients<T>& k, int i, Vec<T> dy, Vec<T> x, uint32_t bits) {
    if constexpr (RELU == Relu::MASK) return where_bits<T>(bits, i, dy);
    if constexpr (RELU == Relu::RECOMPUTE) {
      const Vec<T> z = normalised<T>(x, k.mean.v[i], k.scale.v[i], k.bias.v[i]);
      return (Vec<T>)((Vec<IntOf<T>>)dy & passes<T>(z));
    }
    return dy;
  }

  static void sums(const BatchNorm& p, const void* dy, const void* x, const uint8_t* mask, const void* constants,
                   Range n, Range c, double* sums, void* scratch) {
    const Channels<T> channels(p, constants);
    with_relu(p, mask, [&](auto relu) {
      const Storage *g = static_cast<const Storage*>(dy), *v = static_cast<const Storage*>(x);
      if (p.rows) return sums_of_rows<relu.value>(p, g, v, mask, channels, n, c, sums, static_cast<T*>(scratch));
      sums_of_planes<relu.value>(p, g, v, mask, channels, n, c, sums);
    });
  }

  template <Relu RELU>
  static void sums_of_planes(const BatchNorm& p, const Storage* dy, const Storage* x, const uint8_t* mask,
                             const Channels<T>& channels, Range n, Range c, double* sums) {
    for (int64_t i = c.begin; i < c.end; i++) sums[i] = sums[p.C + i] = 0;
    const int64_t next = ahead(p);
    const auto add = [&](Sums<T>& s, int64_t channel, int64_t at, int64_t m, int64_t byte) FASTARCH_INLINED {
      const Coefficients<T> k = channels.of_plane(channel);
      prefetch(dy + at, next), prefetch(x + at, next);
      const U g = load_unit<T>(dy + at, m), v = load_unit<T>(x + at, m);  // of dy's missing elements 0 is added
      uint32_t passed = 0;
      if constexpr (RELU == Relu::MASK) passed = load_bits(mask + byte, m);
      each_vector<T>([&](int i) FASTARCH_INLINED {
        const Vec<T> dz = through_relu<RELU>(k, i, g.v[i], v.v[i], passed);
        s.a.v[i] += dz, s.b.v[i] += dz * (v.v[i] - k.mean.v[i]);
      });
    };
    const auto flush = [&](int64_t channel, int64_t, int64_t, double sum, double sum_x) {
      sums[channel] += sum, sums[p.C + channel] += sum_x;
    };
    sum_planes<T, PLANE_CHUNK>(p, n, c, add, flush);
  }

  template <Relu RELU>
  static void sums_of_rows(const BatchNorm& p, const Storage* dy, const Storage* x, const uint8_t* mask,
                           const Channels<T>& channels, Range n, Range c, double* sums, T* scratch) {
    const int64_t next = ahead(p), together = rows_together(p);
    T *sum = scratch, *sum_x = scratch + ceil_div(p.C, UNIT) * UNIT;
    for (int64_t i = c.begin; i < c.end; i++) sums[i] = sums[p.C + i] = 0;
    for (int64_t chunk = n.begin; chunk < n.end; chunk += ROW_CHUNK) {
      for (int64_t i = c.begin; i < c.end; i++) sum[i] = sum_x[i] = 0;
      for (int64_t begin = chunk; begin < least(chunk + ROW_CHUNK, n.end); begin += together) {
        const int64_t end = least(begin + together, least(chunk + ROW_CHUNK, n.end));
        each_unit(c.begin, c.end, [&](int64_t channel, int64_t m) FASTARCH_INLINED {
          const Coefficients<T> k = channels.of_row(channel, m);
          U s = load_unit<T>(sum + channel, UNIT), sx = load_unit<T>(sum_x + channel, UNIT);
          for (int64_t i = begin; i < end; i++) {
            const int64_t at = i * p.C + channel;
            prefetch(dy + at, next), prefetch(x + at, next);
            const U g = load_unit<T>(dy + at, m), v = load_unit<T>(x + at, m);
            uint32_t passed = 0;
            if constexpr (RELU == Relu::MASK) passed = load_bits(mask + i * mask_bytes(p.C) + channel / 8, m);
            each_vector<T>([&](int j) FASTARCH_INLINED {
              const Vec<T> dz = through_relu<RELU>(k, j, g.v[j], v.v[j], passed);
              s.v[j] += dz, sx.v[j] += dz * (v.v[j] - k.mean.v[j]);
            });
          }
          store_unit<T>(sum + channel, s, UNIT), store_unit<T>(sum_x + channel, sx, UNIT);
        });
      }
      for (int64_t i = c.begin; i < c.end; i++) sums[i] += sum[i], sums[p.C + i] += sum_x[i];
    }
  }

  static void gradients(const BatchNorm& p, const void* var, const double* sums, int64_t parts, Range c,
                        void* constants, void* dweight, void* dbias) {
    const double count = double(p.N) * p.S;
    for (int64_t i = c.begin; i < c.end; i++) {
      const double r = rstd(p, static_cast<const T*>(var)[i]);
      double sum = 0, sum_x = 0;
      for (int64_t part = 0; part < parts; part++)
        sum += sums[2 * part * p.C + i], sum_x += sums[(2 * part + 1) * p.C + i];
      if (dweight) static_cast<T*>(dweight)[i] = T(sum_x * r);
      if (dbias) static_cast<T*>(dbias)[i] = T(sum);
      if (constants) centre(Channels<T>(p, constants), i, r, sum / count, sum_x * r / count);
    }
  }

  static void apply(const BatchNorm& p, const void* dy, const void* x, const uint8_t* mask, const void* constants,
                    void* dx, void* dresidual, Range n, Range c) {
    const Channels<T> channels(p, constants);
    const Storage *gradient = static_cast<const Storage*>(dy), *in = static_cast<const Storage*>(x);
    Storage *out = static_cast<Storage*>(dx), *out_residual = static_cast<Storage*>(dresidual);
    const int64_t next = ahead(p);
    const bool streams = past_caches<T>(p, out) && past_caches<T>(p, out_residual);
    with_relu(p, mask, [&](auto relu) {
      const auto run = [&](auto want_x, auto want_residual) {
        const auto unit = [&](const Coefficients<T>& k, int64_t at, int64_t m, int64_t byte) FASTARCH_INLINED {
          prefetch(gradient + at, next), prefetch(in + at, next);
          const U g = load_unit<T>(gradient + at, m), v = load_unit<T>(in + at, m);
          U dz, d;
          uint32_t passed = 0;
          if constexpr (relu.value == Relu::MASK) passed = load_bits(mask + byte, m);
          each_vector<T>([&](int i) FASTARCH_INLINED {
            dz.v[i] = through_relu<relu.value>(k, i, g.v[i], v.v[i], passed);
            d.v[i] = k.scale.v[i] * dz.v[i];
            if (p.centred) d.v[i] += (v.v[i] - k.mean.v[i]) * k.slope.v[i] + k.offset.v[i];
          });
          if constexpr (want_residual.value) store_unit<T>(out_residual + at, dz, m, streams);
          if constexpr (want_x.value) store_unit<T>(out + at, d, m, streams);
        };
        walk(p, channels, n, c, unit);
        if (streams) fence_streams();
      };
      constexpr Yes yes;
      constexpr No no;
      if (dx) return dresidual ? run(yes, yes) : run(yes, no);
      run(no, yes);
    });
  }

  static constexpr BatchNormBwd table = {scratch_bytes, constants_bytes, constants, means, sums, gradients, apply};
};

}  // namespace

FASTARCH_EXPORT(BatchNormBwds, batch_norm_bwd) = {
    {Backward<float>::table, Backward<double>::table, Backward<BFloat16>::table, Backward<Float16>::table}};
