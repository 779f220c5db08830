// The polyphase view of a convolution, which forward and backward of conv_relu_pool share.
//
// Along an axis with stride t and dilation d, tap s reads x at
//   i t + s d = (i + q) t + f,   shift q = s d div t,   phase f = s d mod t.
// With the samples of each phase in a plane of their own, every strided and dilated convolution is a sum of plain
// correlations at unit stride: tap s is plane f, moved by q. That keeps the lanes of a warp on neighbouring words, and
// lets one aligned window of eight words in registers serve up to four taps.
#pragma once

#include <cstdint>

#include "cuda/conv_relu_pool.h"
#include "cuda/kernel.h"

namespace fastarch {

constexpr int kQuad = 4;               // neighbouring columns that a thread owns: 16 bytes of float32
constexpr int kMaxChannels = 4;        // input channels
constexpr int kMaxTaps = 512;          // C R S
constexpr int kMaxGroups = 128;        // of Taps
constexpr int kMaxShared = 80 * 1024;  // bytes of a block: two fit an A100's multiprocessor, and one any GPU's since
constexpr int kMultiprocessors = 132;  // of an H100 or H200: plans aim at them on every GPU, so that results agree

// The taps of one filter row by place = phase * 4 groups + shift, four shifts a group. The backward counts shifts from
// the other end: the adjoint of a correlation is the correlation with the filter turned round.
struct Taps {
  int stride, dilation;
  int last;    // the largest shift
  int groups;  // of four shifts, in each phase
  bool mirrored;
  uint32_t present[kMaxGroups / 8];  // 4 bits a group: which of its shifts are taps (dilation leaves gaps)

  __host__ __device__ int places() const { return stride * groups * kQuad; }
  __host__ __device__ int place(int s) const {
    const int shift = s * dilation / stride;
    return s * dilation % stride * groups * kQuad + (mirrored ? last - shift : shift);
  }
  __device__ unsigned in_group(unsigned group) const { return present[group / 8] >> group % 8 * kQuad & 15; }
};

inline int tap_groups(int taps, int stride, int dilation) { return (taps - 1) * dilation / stride / kQuad + 1; }

// The limits that all three kernels have in common.
inline bool few_taps(const ConvReluPoolShape& s) {
  return s.C <= kMaxChannels && int64_t{s.R} * s.S <= kMaxTaps && s.C * s.R * s.S <= kMaxTaps &&
         int64_t{s.stride.w} * tap_groups(s.S, s.stride.w, s.dilation.w) <= kMaxGroups;
}

inline Taps taps_of(int taps, int stride, int dilation, bool mirrored) {
  Taps row = {};
  row.stride = stride;
  row.dilation = dilation;
  row.last = (taps - 1) * dilation / stride;
  row.groups = tap_groups(taps, stride, dilation);
  row.mirrored = mirrored;
  for (int s = 0; s < taps; ++s) row.present[row.place(s) / 32] |= 1u << row.place(s) % 32;
  return row;
}

// Lanes walk along a row of `width` words, 16 bytes each, and then on to the row `rows` further down. This is the
// row pitch of at least `least` words at which that step moves on by as few memory banks as a step along the row.
inline int conflict_free_pitch(int least, int rows, int width) {
  const auto detour = [&](int pitch) {
    const int banks = ((rows * pitch - width) % 32 + 32) % 32;
    return banks < 32 - banks ? banks : 32 - banks;
  };
  int best = round_up(least, kQuad);
  for (int pitch = best + kQuad; pitch < least + 32; pitch += kQuad) {
    if (detour(pitch) < detour(best)) best = pitch;
  }
  return best;
}

inline int word_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

template <typename A>
struct alignas(16) Quad {
  A v[kQuad];
};

// sum[m][i][j] += sum over the taps of one filter row in one phase of filter[tap][m] * plane[i][j + shift of the tap].
// `plane` is the thread's first element and `filter` the phase's first place, both 16-byte aligned in shared memory.
template <int M, int ROWS, typename A>
__device__ __forceinline__ void correlate(A (&sum)[M][ROWS][kQuad], const A* plane, int pitch, const A* filter,
                                          int filter_pitch, const Taps& taps, int phase) {
  for (int group = 0; group < taps.groups; ++group) {
    const unsigned present = taps.in_group(phase * taps.groups + group);
    if (present == 0) continue;
    A window[ROWS][2 * kQuad];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const Quad<A>* row = reinterpret_cast<const Quad<A>*>(plane + i * pitch + group * kQuad);
      const Quad<A> left = row[0], right = row[1];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        window[i][j] = left.v[j];
        window[i][kQuad + j] = right.v[j];
      }
    }
#pragma unroll
    for (int shift = 0; shift < kQuad; ++shift) {
      if (!(present >> shift & 1)) continue;
      const Quad<A>* weights = reinterpret_cast<const Quad<A>*>(filter + (group * kQuad + shift) * filter_pitch);
#pragma unroll
      for (int q = 0; q < div_up(M, kQuad); ++q) {
        const Quad<A> weight = weights[q];
#pragma unroll
        for (int m = q * kQuad; m < (q + 1) * kQuad && m < M; ++m) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < kQuad; ++j) sum[m][i][j] += weight.v[m % kQuad] * window[i][j + shift];
          }
        }
      }
    }
  }
}

// A rectangle of one image in shared memory: rows of `pitch` words, split by phase into planes of `plane` words in the
// order [channel, phase_h, phase_w]. `size` rows and columns are staged, from (h0, w0) on; the image's outside is zero.
// ROWS is how many loads a thread keeps in flight.
struct InputTile {
  Extent size, phases;
  int pitch, plane;
};

template <typename T, int ROWS, typename A>
__device__ __forceinline__ void stage_input(A* shared, const InputTile& tile, const ConstTensor4& x,
                                            const ConvReluPoolShape& shape, int n, int c0, int channels, int h0,
                                            int w0) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const T* image = static_cast<const T*>(x.data) + n * x.stride[0];
  for (int row = threadIdx.x / kWarp * ROWS; row < channels * tile.size.h; row += warps * ROWS) {
    int64_t from[ROWS];
    int to[ROWS];
    bool inside[ROWS], live[ROWS];
    int c = row / tile.size.h, y = row % tile.size.h;
    int row_phase = y % tile.phases.h, plane_row = y / tile.phases.h;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int h = h0 + y;
      live[i] = c < channels;
      inside[i] = live[i] && h >= 0 && h < shape.H;
      from[i] = (c0 + c) * x.stride[1] + h * x.stride[2];
      to[i] = (c * tile.phases.h + row_phase) * tile.phases.w * tile.plane + plane_row * tile.pitch;
      if (++row_phase == tile.phases.h) {
        row_phase = 0;
        ++plane_row;
      }
      if (++y == tile.size.h) {
        y = row_phase = plane_row = 0;
        ++c;
      }
    }
    int phase = lane % tile.phases.w, column = lane / tile.phases.w;
    for (int i = lane; i < tile.size.w; i += kWarp) {
      const int w = w0 + i;
      A value[ROWS];
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        value[j] = inside[j] && w >= 0 && w < shape.W ? widen(image[from[j] + w * x.stride[3]]) : A(0);
      }
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        if (live[j]) shared[to[j] + phase * tile.plane + column] = value[j];
      }
      column += kWarp / tile.phases.w;
      phase += kWarp % tile.phases.w;
      if (phase >= tile.phases.w) {
        phase -= tile.phases.w;
        ++column;
      }
    }
  }
}

// What the mean over window (p, q) divides by: avg_pool2d counts padding, but not what ceil_mode adds beyond it.
__device__ __forceinline__ int mean_divisor(const ConvReluPoolShape& s, int p, int q) {
  const int top = p * s.pool_stride.h - s.pool_padding.h, left = q * s.pool_stride.w - s.pool_padding.w;
  return min(s.pool_size.h, s.OH + s.pool_padding.h - top) * min(s.pool_size.w, s.OW + s.pool_padding.w - left);
}

// Walks `step` by `step` through the positions (c, b, a), a first, of a box size_a wide and size_b high, from `start`
// on. A division is dozens of instructions; this needs them only to begin.
struct Walk {
  int size_a, size_b, step_a, step_b, step_c, a, b, c;

  __device__ __forceinline__ Walk(int size_a, int size_b, int start, int step)
      : size_a(size_a),
        size_b(size_b),
        step_a(step % size_a),
        step_b(step / size_a % size_b),
        step_c(step / size_a / size_b),
        a(start % size_a),
        b(start / size_a % size_b),
        c(start / size_a / size_b) {}

  __device__ __forceinline__ void advance() {
    a += step_a;
    if (a >= size_a) {
      a -= size_a;
      ++b;
    }
    b += step_b;
    if (b >= size_b) {
      b -= size_b;
      ++c;
    }
    c += step_c;
  }
};

// Rows and columns of the input that `conv` rows and columns of the convolution see.
inline Extent seen_by(Extent conv, const ConvReluPoolShape& s) {
  return {(conv.h - 1) * s.stride.h + (s.R - 1) * s.dilation.h + 1,
          (conv.w - 1) * s.stride.w + (s.S - 1) * s.dilation.w + 1};
}

// Rows and columns of the convolution under `pooled` rows and columns of windows.
inline Extent under(Extent pooled, const ConvReluPoolShape& s) {
  return {(pooled.h - 1) * s.pool_stride.h + s.pool_size.h, (pooled.w - 1) * s.pool_stride.w + s.pool_size.w};
}

}  // namespace fastarch
