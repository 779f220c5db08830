// y = pool(relu(v)) over rows v of a convolution that are still in the cache, and the index for the backward.
#pragma once

#include "cpu/conv_relu_pool.h"
#include "cpu/layout.h"

namespace {

FASTARCH_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTARCH_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FASTARCH_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    if (INDEX) index = better ? splat(IntOf<T>(at)) : index;
  }
  FASTARCH_INLINE void finish(int64_t) {}
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

// Calls body with an object of the pool that is wanted.
template <class T, class Body>
FASTARCH_INLINE void with_pool(bool average, bool index, const Body& body) {
  if (average) {
    index ? body(Average<T, true>{}) : body(Average<T, false>{});
  } else {
    index ? body(Max<T, true>{}) : body(Max<T, false>{});
  }
}

// One pooled row of `width` channels (whole vectors); the convolution's row i stands at rows + i % pool_h * OW * width.
// value and index: [PW][width].
template <class Pool, class T>
void pool_row(const ConvReluPool& p, int64_t ph, const T* rows, int64_t width, T* value, IntOf<T>* index) {
  const Window h = window_h(p, ph);
  const T* ring[MAX_WINDOW];
  for (int64_t i = h.begin; i < h.end; i++) ring[i - h.begin] = rows + i % p.pool_h * p.OW * width;
  for (int64_t pw = 0; pw < p.PW; pw++) {
    const Window w = window_w(p, pw);
    for (int64_t c = 0; c < width; c += LANES<T>) {
      Pool pool;
      for (int64_t i = h.begin; i < h.end; i++) {
        const T* row = ring[i - h.begin] + c;
        const int64_t at = (i - h.start) * p.pool_w - w.start;
        for (int64_t j = w.begin; j < w.end; j++) pool.take(load(row + j * width), at + j);
      }
      pool.finish(divisor(p, h, w));
      store(value + pw * width + c, pool.value);
      if (index) store(index + pw * width + c, pool.index);
    }
  }
}

// Pooled rows that are collected before they are written: enough columns to transpose in whole vectors.
FASTARCH_INLINE int64_t rows_per_chunk(const ConvReluPool& p) { return least(p.PH, ceil_div(128, p.PW)); }

template <class T>
int64_t pool_rows_scratch(const ConvReluPool& p, int64_t width) {
  return (p.pool_h * p.OW + 2 * rows_per_chunk(p) * p.PW) * width;  // rows of the convolution, values, indices
}

// Pooled rows [begin, end) of `width` channels (whole vectors), `live` of which are real. convolve(i, to) computes row i
// of the convolution, [OW][width]. y and index (or nullptr) point to the image's first of these channels.
template <class Pool, class Storage, class T, class Convolve>
void pool_rows(const ConvReluPool& p, int64_t begin, int64_t end, int64_t width, int64_t live, Convolve convolve,
               T* scratch, Storage* y, uint8_t* index) {
  const int64_t chunk = rows_per_chunk(p);
  T* value = scratch + p.pool_h * p.OW * width;
  auto* at = reinterpret_cast<IntOf<T>*>(value + chunk * p.PW * width);
  int64_t next = window_h(p, begin).begin;  // the first row not convolved yet
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = least(chunk, end - first);
    for (int64_t row = 0; row < rows; row++) {
      const Window h = window_h(p, first + row);
      for (next = most(next, h.begin); next < h.end; next++) convolve(next, scratch + next % p.pool_h * p.OW * width);
      pool_row<Pool>(p, first + row, scratch, width, value + row * p.PW * width,
                     index ? at + row * p.PW * width : nullptr);
    }
    // rows follow each other without a gap in y and index, so a chunk is one block of columns
    copy_block(y + first * p.y.h, {p.y.w, p.y.c}, value, {width, 1}, rows * p.PW, live);
    if (index) copy_block(index + first * p.index.h, {p.index.w, p.index.c}, at, {width, 1}, rows * p.PW, live);
  }
}

}  // namespace
