// y = pool(relu(v)) over rows v of a convolution that are still in the cache, and the index for the backward.
#pragma once

#include "cpu/conv_relu_pool.h"
#include "cpu/layout.h"
#include "cpu/range.h"

namespace {

// The window of one pooled row or column: where it starts (maybe outside) and the elements that it truly has.
struct Window {
  int64_t start, begin, end;
};
FASTARCH_INLINE Window window(int64_t at, int64_t stride, int64_t padding, int64_t size, int64_t n) {
  const int64_t start = at * stride - padding;
  return {start, most(start, 0), least(start + size, n)};
}
FASTARCH_INLINE Window window_h(const ConvReluPool& p, int64_t ph) {
  return window(ph, p.pool_stride_h, p.pool_padding_h, p.pool_h, p.OH);
}
FASTARCH_INLINE Window window_w(const ConvReluPool& p, int64_t pw) {
  return window(pw, p.pool_stride_w, p.pool_padding_w, p.pool_w, p.OW);
}

// What an average divides by: padding counts, but not what overhangs it under ceil_mode, as in torch.
FASTARCH_INLINE int64_t divisor(const ConvReluPool& p, const Window& h, const Window& w) {
  return (least(h.start + p.pool_h, p.OH + p.pool_padding_h) - h.start) *
         (least(w.start + p.pool_w, p.OW + p.pool_padding_w) - w.start);
}

// Starting from 0 and CUT, one rule gives ReLU, the first maximum and NaN its way: take v if v > best or v is NaN.
template <class T, bool INDEX>
struct Max {
  Vec<T> value = {};
  Vec<IntOf<T>> index = splat(IntOf<T>(CUT));

  FASTARCH_INLINE void take(Vec<T> v, int64_t at) {
    const Vec<IntOf<T>> better = (v > value) | (v != v);
    value = better ? v : value;
    index = better ? splat(IntOf<T>(at)) : index;
  }
  FASTARCH_INLINE void finish(int64_t) {}
};

// Without the index NaN can wait until the end, which leaves one maximum per element. Where comparisons go to mask
// registers two are faster (AVX-512, one core of a Zen 4: notes_conv1 484 -> 435 us): as integers, what is above 0 and
// NaN are ordered as they are, and of what has a sign, as unsigned integers, only NaN is above minus infinity.
template <class T>
struct Max<T, false> {
  static constexpr bool BY_BITS = VECTOR_BYTES == 64;
  typedef UnsignedOf<T> Unsigned __attribute__((vector_size(VECTOR_BYTES)));
  Vec<T> value = {};
  Vec<IntOf<T>> index = {};  // of NaN, here

  FASTARCH_INLINE void take(Vec<T> v, int64_t) {
    if constexpr (BY_BITS) {
      const auto bits = (Vec<IntOf<T>>)v, best = (Vec<IntOf<T>>)value;
      value = (Vec<T>)(bits > best ? bits : best);
      index = (Vec<IntOf<T>>)((Unsigned)v > (Unsigned)index ? (Unsigned)v : (Unsigned)index);
    } else {
      index |= v != v;
      value = v > value ? v : value;
    }
  }
  FASTARCH_INLINE void finish(int64_t) {
    if constexpr (BY_BITS) {
      value = (Unsigned)index > (Unsigned)splat(-T(__builtin_inf())) ? (Vec<T>)index : value;
    } else {
      value = index ? (Vec<T>)index : value;
    }
  }
};

template <class T, bool INDEX>
struct Average {
  Vec<T> value = {};
  Vec<IntOf<T>> index = {};

  FASTARCH_INLINE void take(Vec<T> v, int64_t at) {
    const Vec<IntOf<T>> alive = (v > Vec<T>{}) | (v != v);
    value += alive ? v : Vec<T>{};
    if (INDEX) index |= alive & splat(IntOf<T>(IntOf<T>(1) << at));
  }
  FASTARCH_INLINE void finish(int64_t divisor) { value /= splat(T(divisor)); }
};

// Without ReLU, and a window of one element.
template <class T>
struct Linear {
  Vec<T> value;
  Vec<IntOf<T>> index = {};

  FASTARCH_INLINE void take(Vec<T> v, int64_t) { value = v; }
  FASTARCH_INLINE void finish(int64_t) {}
};

// Calls body with an object of the pool that is wanted.
template <class T, class Body>
FASTARCH_INLINE void with_pool(const ConvReluPool& p, bool index, const Body& body) {
  if (!p.relu) {
    body(Linear<T>{});
  } else if (p.average) {
    index ? body(Average<T, true>{}) : body(Average<T, false>{});
  } else {
    index ? body(Max<T, true>{}) : body(Max<T, false>{});
  }
}

// relu(v + r) on the way into y, for a residual r laid out as y or nullptr, or without ReLU. NaN stays.
template <class Storage, class T>
struct Rectified {
  static constexpr bool COPIES = false;
  const Storage *y, *r;
  bool relu;

  FASTARCH_INLINE Vec<T> operator()(Vec<T> v, const Storage* at, int64_t n) const {
    if (r) v += load_as<T>(r + (at - y), n);
    return !relu ? v : (v > Vec<T>{}) | (v != v) ? v : Vec<T>{};
  }
};

// A ring of the convolution's rows: those that a window still needs, and those that are computed at once.
template <class T>
struct Ring {
  T* rows;
  int64_t row, length;  // elements of a row, rows

  FASTARCH_INLINE T* operator[](int64_t i) const { return rows + i % length * row; }
};

// Columns [begin, end) of one pooled row, from the convolution's rows under it. H x W is the window's size where all of
// its elements exist, or 0 x 0 where they may not.
template <int H, int W, class Pool, class T>
FASTARCH_INLINE void pool_columns(const ConvReluPool& p, const Window& h, const T* const* rows, int64_t begin,
                                  int64_t end, int64_t width, T* value, int64_t step, IntOf<T>* index) {
  for (int64_t pw = begin; pw < end; pw++) {
    const Window w = window_w(p, pw);
    for (int64_t c = 0; c < width; c += LANES<T>) {
      Pool pool;
      if constexpr (H > 0) {
#pragma GCC unroll 3
        for (int i = 0; i < H; i++) {
#pragma GCC unroll 3
          for (int j = 0; j < W; j++) pool.take(load(rows[i] + (w.start + j) * width + c), i * W + j);
        }
      } else {
        for (int64_t i = h.begin; i < h.end; i++) {
          const T* row = rows[i - h.begin] + c;
          const int64_t at = (i - h.start) * p.pool_w - w.start;
          for (int64_t j = w.begin; j < w.end; j++) pool.take(load(row + j * width), at + j);
        }
      }
      pool.finish(divisor(p, h, w));
      store(value + pw * step + c, pool.value);
      if (index) store(index + pw * width + c, pool.index);
    }
  }
}

// One pooled row of `width` channels (whole vectors) from the convolution's rows [OW][width]: value [PW] with the given
// step between columns, index [PW][width].
template <class Pool, class T>
void pool_row(const ConvReluPool& p, int64_t ph, const Ring<T>& ring, int64_t width, T* value, int64_t step,
              IntOf<T>* index) {
  const Window h = window_h(p, ph);
  const T* rows[MAX_WINDOW];
  for (int64_t i = h.begin; i < h.end; i++) rows[i - h.begin] = ring[i];
  // the columns whose windows are whole, unrolled where they are small: notes_conv1 338 -> 278 us on one core
  int64_t begin = least(p.PW, ceil_div(p.pool_padding_w, p.pool_stride_w));
  int64_t end = least(p.PW, (p.OW + p.pool_padding_w - p.pool_w) / p.pool_stride_w + 1);
  if (h.end - h.begin < p.pool_h || end < begin) end = begin;
  if (p.pool_h == 2 && p.pool_w == 2) {
    pool_columns<2, 2, Pool>(p, h, rows, begin, end, width, value, step, index);
  } else if (p.pool_h == 3 && p.pool_w == 3) {
    pool_columns<3, 3, Pool>(p, h, rows, begin, end, width, value, step, index);
  } else {
    end = begin;
  }
  pool_columns<0, 0, Pool>(p, h, rows, 0, begin, width, value, step, index);
  pool_columns<0, 0, Pool>(p, h, rows, end, p.PW, width, value, step, index);
}

// Pooled rows that are collected before they are written: enough columns to transpose in whole vectors.
FASTARCH_INLINE int64_t rows_per_chunk(const ConvReluPool& p) { return least(p.PH, ceil_div(128, p.PW)); }

// For rows of the convolution that are computed AT_ONCE, beginning at a multiple of it.
template <int AT_ONCE, class T>
Ring<T> ring_of_rows(const ConvReluPool& p, int64_t width, T* scratch) {
  return {scratch, ceil_div(p.OW, AT_ONCE) * AT_ONCE * width, p.pool_h + AT_ONCE - 1};
}
template <int AT_ONCE, class T>
int64_t pool_rows_scratch(const ConvReluPool& p, int64_t width) {
  const Ring<T> ring = ring_of_rows<AT_ONCE, T>(p, width, nullptr);
  return ring.length * ring.row + 2 * rows_per_chunk(p) * p.PW * width;  // ring, values, indices
}

// Pooled rows [begin, end) of `width` channels (whole vectors), `live` of which are real. pool_row(i, value, step, at)
// computes one: value [PW] with the given step between columns, at [PW][width] or nullptr. y and index (or nullptr)
// point to the image's first of these channels. With several images each has a share of `width` and follows the one
// before.
template <class Storage, class T, class PoolRow, class Finish>
void write_rows(const ConvReluPool& p, int64_t begin, int64_t end, int64_t width, int64_t live, PoolRow pool_row,
                T* scratch, const Finish& finish, Storage* y, uint8_t* index, int64_t images = 1, int64_t share = 0) {
  const int64_t chunk = rows_per_chunk(p);
  T* value = scratch;
  auto* at = reinterpret_cast<IntOf<T>*>(value + chunk * p.PW * width);
  // whole vectors of a channels-last output need no copy
  const bool in_place = Finish::COPIES && sizeof(Storage) == sizeof(T) && p.y.c == 1 && live == width;
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = least(chunk, end - first);
    for (int64_t row = 0; row < rows; row++) {
      T* to = in_place ? reinterpret_cast<T*>(y + (first + row) * p.y.h) : value + row * p.PW * width;
      pool_row(first + row, to, in_place ? p.y.w : width, index ? at + row * p.PW * width : nullptr);
    }
    // rows follow each other without a gap in y and index, so a chunk is one block of columns
    for (int64_t image = 0; image < images; image++) {
      if (!in_place) {
        copy_block(y + image * p.y.n + first * p.y.h, {p.y.w, p.y.c}, value + image * share, {width, 1}, rows * p.PW,
                   live, finish);
      }
      if (index) {
        copy_block(index + image * p.index.n + first * p.index.h, {p.index.w, p.index.c}, at + image * share,
                   {width, 1}, rows * p.PW, live);
      }
    }
  }
}

// The same from rows of the convolution: convolve(i, ring) computes rows [i, i + AT_ONCE). r is laid out
// as y, or nullptr.
template <int AT_ONCE, class Pool, class Storage, class T, class Convolve>
void pool_rows(const ConvReluPool& p, int64_t begin, int64_t end, int64_t width, int64_t live, Convolve convolve,
               T* scratch, const Storage* r, Storage* y, uint8_t* index, int64_t images = 1, int64_t share = 0) {
  const Ring<T> ring = ring_of_rows<AT_ONCE>(p, width, scratch);
  int64_t next = 0;  // the first row not convolved yet
  const auto from_ring = [&](int64_t row, T* value, int64_t step, IntOf<T>* at) {
    const Window h = window_h(p, row);
    next = most(next, h.begin / AT_ONCE * AT_ONCE);
    for (; next < h.end; next += AT_ONCE) convolve(next, ring);
    if (r) {
      memcpy(value, ring[row], p.OW * width * sizeof(T));
    } else {
      pool_row<Pool>(p, row, ring, width, value, step, at);
    }
  };
  T* const rest = scratch + ring.length * ring.row;
  if (r)
    return write_rows(p, begin, end, width, live, from_ring, rest, Rectified<Storage, T>{y, r, p.relu}, y, nullptr);
  write_rows(p, begin, end, width, live, from_ring, rest, AsItIs{}, y, index, images, share);
}

}  // namespace
