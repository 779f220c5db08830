// conv_relu_pool, forward, for few input channels:
//
//   conv[n, k, i, j] = b[k] + sum_{c, r, s} x[n, c, i stride_h + r dilation_h - padding_h, ...] w[k, c, r, s]
//   y[n, k, p, q]    = maximum or mean over the window at (p, q) of relu(conv[n, k, ., .])
//
// x [N, C, H, W], w [K, C, R, S], b [K]; conv [N, K, OH, OW]; y and index [N, K, PH, PW].
//
// A block owns a tile of y and up to 64 channels. A thread keeps 8 channels x 2 rows x 4 columns of conv in registers,
// so that twelve 16-byte reads of shared memory feed 256 multiply-adds; the finished tile of conv then takes the place
// of x and w in shared memory, and the windows, overlapping or not, are pooled from there. (Windows of 2 x 2 that do
// not overlap never leave the registers.)
#include <algorithm>
#include <limits>

#include "cuda/conv_relu_pool.cuh"

namespace fastarch {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 8;  // of a thread
constexpr int kRows = 2;      // of a thread

struct FwdPlan {
  Extent tile, tiles;            // pooled outputs of a block; blocks that cover an image
  int channels, channel_blocks;  // of a block, in groups of kChannels; blocks that cover K
  int lanes;                     // threads of a channel group: whole warps, so that a warp shares its filters
  int quads, units;              // thread tiles in a row of the conv tile, and in all
  int staged;                    // input channels in shared memory at a time
  InputTile input;
  int filter_pitch;            // words from one tap's channels to the next's
  bool in_registers;           // the windows are pooled there, without a conv tile in shared memory
  int conv_width, conv_plane;  // the conv tile in shared memory: [channels, conv_plane / conv_width, conv_width]
  size_t shared_bytes;
  Taps taps;
};

struct FwdParams {
  ConvReluPoolFwd args;
  FwdPlan plan;
};

// w of `channels` output channels from k0 on as filters[place of the tap][channel], zero where a channel is past K.
template <typename T, typename A>
__device__ __forceinline__ void stage_filters(A* filters, const FwdParams& params, int k0, int c0, int channels) {
  const ConvReluPoolShape& shape = params.args.shape;
  const FwdPlan& plan = params.plan;
  const ConstTensor4& w = params.args.w;
  const int area = shape.R * shape.S;
  // Eight neighbouring threads take one tap: with an odd multiple of 8 words between taps, a warp meets no bank twice.
  for (int tap = threadIdx.x / 8; tap < channels * area; tap += blockDim.x / 8) {
    const int c = tap / area, r = tap % area / shape.S, s = tap % area % shape.S;
    const T* from = static_cast<const T*>(w.data) + (c0 + c) * w.stride[1] + r * w.stride[2] + s * w.stride[3];
    A* to = filters + ((c * shape.R + r) * plan.taps.places() + plan.taps.place(s)) * plan.filter_pitch;
#pragma unroll 4
    for (int k = threadIdx.x % 8; k < plan.channels; k += 8) {
      to[k] = k0 + k < shape.K ? widen(from[(k0 + k) * w.stride[0]]) : A(0);
    }
  }
}

// One window on its way to one element of y and of index.
template <bool AVERAGE, typename A>
struct Window {
  A value = 0;
  unsigned code = AVERAGE ? 0 : 255;

  __device__ __forceinline__ void take(A v, int element) {
    if (AVERAGE) {
      if (v <= 0) return;  // NaN passes ReLU
      value += v;
      code |= 1u << element;
    } else if (v > value || v != v) {  // ReLU, first maximum and NaN in one rule, since value starts at 0
      value = v;
      code = element;
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(const ConvReluPoolFwd& args, int n, int k, int p, int q) {
    if (AVERAGE) value /= static_cast<A>(mean_divisor(args.shape, p, q));
    const int64_t* stride = args.y.stride;
    const int64_t to = n * stride[0] + k * stride[1] + p * stride[2] + q * stride[3];
    static_cast<T*>(args.y.data)[to] = narrow<T>(value);
    if (args.index != nullptr) args.index[to] = static_cast<uint8_t>(code);
  }
};

// Windows of 2 x 2 that do not overlap: a thread's own 2 x 4 elements of conv are two of them.
template <typename T, bool AVERAGE, typename A>
__device__ __forceinline__ void pool_registers(const A (&conv)[kChannels][kRows][kQuad], const FwdParams& params, int n,
                                               int k0, int p0, int q0, int row, int column) {
  const ConvReluPoolShape& shape = params.args.shape;
  const int p = p0 + row / 2;
  if (p >= shape.PH) return;
#pragma unroll
  for (int m = 0; m < kChannels; ++m) {
    if (k0 + m >= shape.K) return;
#pragma unroll
    for (int j = 0; j < kQuad; j += 2) {
      const int q = q0 + (column + j) / 2;
      if ((column + j) / 2 >= params.plan.tile.w || q >= shape.PW) continue;
      Window<AVERAGE, A> window;
#pragma unroll
      for (int element = 0; element < 4; ++element) window.take(conv[m][element / 2][j + element % 2], element);
      window.template store<T>(params.args, n, k0 + m, p, q);
    }
  }
}

// Any windows, from the block's tile of conv in shared memory. Neighbouring threads write neighbouring elements.
template <typename T, bool AVERAGE, typename A>
__device__ __forceinline__ void pool_shared(const A* conv, const FwdParams& params, int n, int k0, int p0, int q0) {
  const ConvReluPoolShape& shape = params.args.shape;
  const FwdPlan& plan = params.plan;
  const bool channels_last = params.args.y.stride[1] == 1;
  Walk walk(channels_last ? plan.channels : plan.tile.w, channels_last ? plan.tile.w : plan.tile.h, threadIdx.x,
            blockDim.x);
  for (int i = threadIdx.x; i < plan.channels * plan.tile.h * plan.tile.w; i += blockDim.x, walk.advance()) {
    const int k = channels_last ? walk.a : walk.c;
    const int row = channels_last ? walk.c : walk.b, column = channels_last ? walk.b : walk.a;
    const int p = p0 + row, q = q0 + column;
    if (k0 + k >= shape.K || p >= shape.PH || q >= shape.PW) continue;

    const int top = p * shape.pool_stride.h - shape.pool_padding.h;
    const int left = q * shape.pool_stride.w - shape.pool_padding.w;
    const int i0 = max(0, -top), i1 = min(shape.pool_size.h, shape.OH - top);
    const int j0 = max(0, -left), j1 = min(shape.pool_size.w, shape.OW - left);
    const A* corner =
        conv + k * plan.conv_plane + row * shape.pool_stride.h * plan.conv_width + column * shape.pool_stride.w;
    Window<AVERAGE, A> window;
    for (int i = i0; i < i1; ++i) {
      for (int j = j0; j < j1; ++j) window.take(corner[i * plan.conv_width + j], i * shape.pool_size.w + j);
    }
    window.template store<T>(params.args, n, k0 + k, p, q);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    conv_relu_pool_fwd_kernel(const __grid_constant__ FwdParams params) {
  using A = accumulator<T>;
  const ConvReluPoolShape& shape = params.args.shape;
  const FwdPlan& plan = params.plan;
  A* const x = dynamic_shared<A>();
  const int input_words = plan.staged * plan.input.phases.h * plan.input.phases.w * plan.input.plane;
  A* const filters = x + input_words;
  A* const conv = x;  // once x and filters are used up

  int block = blockIdx.x;
  const int k0 = block % plan.channel_blocks * plan.channels;
  block /= plan.channel_blocks;
  const int q0 = block % plan.tiles.w * plan.tile.w;
  block /= plan.tiles.w;
  const int p0 = block % plan.tiles.h * plan.tile.h;
  const int n = block / plan.tiles.h;
  const int h0 = (p0 * shape.pool_stride.h - shape.pool_padding.h) * shape.stride.h - shape.padding.h;
  const int w0 = (q0 * shape.pool_stride.w - shape.pool_padding.w) * shape.stride.w - shape.padding.w;

  const int thread = threadIdx.x, lane = thread % plan.lanes;
  const int channel = thread / plan.lanes * kChannels;
  const int unit = min(lane, plan.units - 1);  // surplus lanes repeat the last one
  const int row = unit / plan.quads * kRows, column = unit % plan.quads * kQuad;

  A sum[kChannels][kRows][kQuad] = {};
  for (int c0 = 0; c0 < shape.C; c0 += plan.staged) {
    const int channels = min(plan.staged, shape.C - c0);
    stage_input<T, 4>(x, plan.input, params.args.x, shape, n, c0, channels, h0, w0);
    stage_filters<T>(filters, params, k0, c0, channels);
    __syncthreads();

    const A* filter = filters + channel;
    for (int c = 0; c < channels; ++c) {
      int phase_h = 0, shift_h = 0;  // of tap r
      for (int r = 0; r < shape.R; ++r) {
        const A* plane = x + (c * shape.stride.h + phase_h) * shape.stride.w * plan.input.plane +
                         (row + shift_h) * plan.input.pitch + column;
        for (int phase_w = 0; phase_w < shape.stride.w; ++phase_w) {
          correlate(sum, plane, plan.input.pitch, filter, plan.filter_pitch, plan.taps, phase_w);
          plane += plan.input.plane;
          filter += plan.taps.groups * kQuad * plan.filter_pitch;
        }
        shift_h += shape.dilation.h / shape.stride.h;
        phase_h += shape.dilation.h % shape.stride.h;
        if (phase_h >= shape.stride.h) {
          phase_h -= shape.stride.h;
          ++shift_h;
        }
      }
    }
    __syncthreads();
  }

  const T* b = static_cast<const T*>(params.args.b);
#pragma unroll
  for (int m = 0; m < kChannels; ++m) {
    const int k = k0 + channel + m;
    const A bias = b != nullptr && k < shape.K ? widen(b[k]) : A(0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sum[m][i][j] += bias;
    }
  }
  if (plan.in_registers) {
    if (lane >= plan.units) return;
    if (shape.average) {
      pool_registers<T, true>(sum, params, n, k0 + channel, p0, q0, row, column);
    } else {
      pool_registers<T, false>(sum, params, n, k0 + channel, p0, q0, row, column);
    }
    return;
  }
  if (lane < plan.units) {
#pragma unroll
    for (int m = 0; m < kChannels; ++m) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        A* to = conv + (channel + m) * plan.conv_plane + (row + i) * plan.conv_width + column;
        Quad<A> quad;
#pragma unroll
        for (int j = 0; j < kQuad; ++j) quad.v[j] = sum[m][i][j];
        *reinterpret_cast<Quad<A>*>(to) = quad;
      }
    }
  }
  __syncthreads();
  if (shape.average) {
    pool_shared<T, true>(conv, params, n, k0, p0, q0);
  } else {
    pool_shared<T, false>(conv, params, n, k0, p0, q0);
  }
}

// A block of `groups` channel groups and one tile of y. Sets `staged` to 0 if that does not fit shared memory.
FwdPlan plan_of(const ConvReluPoolShape& s, int word_bytes, Extent tile, int groups) {
  FwdPlan plan = {};
  plan.tile = tile;
  plan.tiles = {div_up(s.PH, tile.h), div_up(s.PW, tile.w)};
  plan.channels = groups * kChannels;
  plan.channel_blocks = div_up(s.K, plan.channels);

  const Extent conv = under(tile, s);
  plan.quads = div_up(conv.w, kQuad);
  plan.units = div_up(conv.h, kRows) * plan.quads;
  plan.lanes = round_up(plan.units, kWarp);
  plan.conv_width = plan.quads * kQuad;
  plan.conv_plane = round_up(round_up(conv.h, kRows) * plan.conv_width, 32) + kQuad;  // 4 banks a channel

  const int places = s.stride.w * tap_groups(s.S, s.stride.w, s.dilation.w) * kQuad;
  const int rows = round_up(conv.h, kRows) + (s.R - 1) * s.dilation.h / s.stride.h;
  plan.input.size = seen_by(conv, s);
  plan.input.phases = s.stride;
  plan.input.pitch = conflict_free_pitch(plan.conv_width + places / s.stride.w, kRows, plan.conv_width);
  plan.filter_pitch = plan.channels % 16 == 8 ? plan.channels : plan.channels + 8;

  const int64_t words = kMaxShared / word_bytes;
  const int64_t plane = int64_t{rows} * plan.input.pitch;
  plan.input.plane = static_cast<int>(plane);
  const int64_t channel_words = s.stride.h * s.stride.w * plane + int64_t{s.R} * places * plan.filter_pitch;
  plan.in_registers = s.pool_size.h == 2 && s.pool_size.w == 2 && s.pool_stride.h == 2 && s.pool_stride.w == 2 &&
                      s.pool_padding.h == 0 && s.pool_padding.w == 0 && s.PH * 2 <= s.OH && s.PW * 2 <= s.OW;
  const int64_t conv_words = plan.in_registers ? 0 : int64_t{plan.channels} * plan.conv_plane;
  if (conv_words > words) return plan;
  plan.staged = static_cast<int>(std::min<int64_t>(s.C, words / channel_words));
  plan.shared_bytes = std::max(plan.staged * channel_words, conv_words) * word_bytes;
  return plan;
}

// An estimate of the time: what the busiest multiprocessor issues, by rough counts of the sm_90a code per tap, staged
// word, output and window element. Fewer than four warps leave schedulers idle.
int64_t cost_of(const ConvReluPoolShape& s, const FwdPlan& plan) {
  const int64_t blocks = int64_t{s.N} * plan.tiles.h * plan.tiles.w * plan.channel_blocks;
  const int64_t warps = plan.channels / kChannels * plan.lanes / kWarp;
  const int64_t taps = int64_t{s.C} * s.R * s.S;
  const int64_t multiply_add = std::max<int64_t>(warps, 4) * taps * (kChannels * kRows * kQuad + 6);
  const int64_t stage = 12 * s.C * plan.input.size.h * plan.input.size.w + 8 * taps * plan.channels;
  const int window = plan.in_registers ? 0 : s.pool_size.h * s.pool_size.w;
  const int64_t pool = plan.channels * plan.tile.h * plan.tile.w * (30 + 8 * window);
  return div_up(blocks, kMultiprocessors) * (multiply_add + (stage + pool) / kWarp);
}

FwdPlan plan_fwd(const ConvReluPoolShape& s, int word_bytes) {
  FwdPlan best = {};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int groups = 1; groups <= kThreads / kWarp && (groups - 1) * kChannels < s.K; ++groups) {
    const bool halves = kThreads / kWarp % groups == 0;
    if (!halves && groups * kChannels < s.K) continue;  // 1, 2, 4, 8, or all of K at once
    const int lanes = kThreads / kWarp / groups * kWarp;
    if (lanes * kQuad < s.pool_size.w) continue;
    for (int w = (lanes * kQuad - s.pool_size.w) / s.pool_stride.w + 1; w > 0; w = w * 2 / 3) {
      w = div_up(s.PW, div_up(s.PW, w));  // tiles of equal size
      const int rows = lanes / div_up(under({1, w}, s).w, kQuad) * kRows;
      if (rows < s.pool_size.h) continue;
      int64_t previous = std::numeric_limits<int64_t>::max();
      for (int h = (rows - s.pool_size.h) / s.pool_stride.h + 1; h > 0; h /= 2) {
        h = div_up(s.PH, div_up(s.PH, h));
        const FwdPlan plan = plan_of(s, word_bytes, {h, w}, groups);
        if (plan.staged == 0) continue;
        const int64_t cost = cost_of(s, plan);
        if (cost < least) {
          least = cost;
          best = plan;
        }
        if (cost > previous) break;
        previous = cost;
      }
    }
  }
  best.taps = taps_of(s.S, s.stride.w, s.dilation.w, false);
  return best;
}

template <typename T>
cudaError_t launch_fwd(const ConvReluPoolFwd& args, cudaStream_t stream) {
  const FwdParams params = {args, plan_fwd(args.shape, sizeof(accumulator<T>))};
  const FwdPlan& plan = params.plan;
  const int64_t blocks = int64_t{args.shape.N} * plan.tiles.h * plan.tiles.w * plan.channel_blocks;
  const int threads = plan.channels / kChannels * plan.lanes;
  return launch(conv_relu_pool_fwd_kernel<T>, blocks, threads, plan.shared_bytes, false, stream, params);
}

}  // namespace

bool conv_relu_pool_fwd_fits(const ConvReluPoolShape& shape, Dtype dtype) {
  return few_taps(shape) && plan_of(shape, word_bytes(dtype), {1, 1}, 1).staged > 0;
}

cudaError_t conv_relu_pool_fwd(const ConvReluPoolFwd& args, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return launch_fwd<float>(args, stream);
    case Dtype::float64:
      return launch_fwd<double>(args, stream);
    case Dtype::bfloat16:
      return launch_fwd<__nv_bfloat16>(args, stream);
    case Dtype::float16:
      return launch_fwd<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastarch
