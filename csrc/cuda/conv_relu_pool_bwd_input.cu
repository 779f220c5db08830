// conv_relu_pool, gradient of the input, for few input channels:
//
//   g[n, k, i, j]   = sum of dy[n, k, p, q] over the windows (p, q) that chose (i, j) as their maximum
//                     (mean: of dy / divisor over the windows in which (i, j) passed ReLU)
//   dx[n, c, h, w]  = sum_{k, r, s} w[k, c, r, s] g[n, k, i, j]   with h = i stride_h + r dilation_h - padding_h, ...
//
// dx [N, C, H, W]; g [N, K, OH, OW], never in global memory; dy and index [N, K, PH, PW]; w [K, C, R, S].
//
// The mirror image of the forward: what there was read from the planes of the stride's phases is written to them here,
// so each phase of dx is a plain correlation of g with the taps of that phase, turned round. A block rebuilds its tile
// of g in shared memory by asking every window that covers an element whether it chose it: a gather, the same bits on
// every run. A thread keeps C channels x 4 rows x 4 columns of one phase of dx in registers.
#include <algorithm>
#include <numeric>

#include "cuda/conv_relu_pool.cuh"

namespace fastarch {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // of a thread

struct BwdInputPlan {
  Extent first;              // row and column of the phase planes at which dx begins
  Extent tile, tiles;        // rows and columns that a block owns of each of its phases; blocks that cover an image
  int phases, phase_blocks;  // of a block; blocks that cover all phases
  int lanes;                 // threads that share the tile of a phase: whole warps, so that a warp shares its taps
  int slices;                // times as many: each sums every slices-th output channel
  int quads, units;          // thread tiles in a row of the tile, and in all
  int staged;                // output channels in shared memory at a time
  Extent last;               // the largest shifts
  int pitch, plane;          // of the tile of g, one plane a channel
  int filter_plane;          // words of one output channel's filters
  int next_tap, next_shift;  // along h, from a tap to the next of its phase
  size_t shared_bytes;
  Taps taps;  // of a filter row
};

struct BwdInputParams {
  ConvReluPoolBwdInput args;
  BwdInputPlan plan;
};

// The windows that cover one row or column of conv: `first` to `last`, none if it lies outside.
struct Windows {
  int first, last;
};

__device__ __forceinline__ Windows windows_over(int at, int conv_size, int size, int stride, int padding, int pooled) {
  if (at < 0 || at >= conv_size) return {0, -1};
  at += padding;
  return {at < size ? 0 : (at - size) / stride + 1, min(at / stride, pooled - 1)};
}

// g of `channels` output channels from k0 on, in the tile whose corner is (i0, j0). `over` has a place for each column.
template <typename T, typename A>
__device__ __forceinline__ void stage_gradient(A* g, const Windows* over, const BwdInputParams& params, int n, int k0,
                                               int channels, int i0, int j0) {
  const ConvReluPoolShape& shape = params.args.shape;
  const BwdInputPlan& plan = params.plan;
  const ConstTensor4 &dy = params.args.dy, &index = params.args.index;
  const int rows = plan.tile.h + plan.last.h, columns = plan.tile.w + plan.last.w;
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < channels * rows; row += blockDim.x / kWarp) {
    const int k = row / rows, i = i0 + row % rows;
    const Windows vertical =
        windows_over(i, shape.OH, shape.pool_size.h, shape.pool_stride.h, shape.pool_padding.h, shape.PH);
    for (int column = lane; column < columns; column += kWarp) {
      const int j = j0 + column;
      const Windows horizontal = over[column];
      A sum = 0;
      for (int p = vertical.first; p <= vertical.last; ++p) {
        for (int q = horizontal.first; q <= horizontal.last; ++q) {
          const int element = (i + shape.pool_padding.h - p * shape.pool_stride.h) * shape.pool_size.w + j +
                              shape.pool_padding.w - q * shape.pool_stride.w;
          const int code = at<uint8_t>(index, n, k0 + k, p, q);
          if (shape.average ? code >> element & 1 : code == element) {
            const A value = widen(at<T>(dy, n, k0 + k, p, q));
            sum += shape.average ? value / static_cast<A>(mean_divisor(shape, p, q)) : value;
          }
        }
      }
      g[k * plan.plane + row % rows * plan.pitch + column] = sum;
    }
  }
}

// w of `channels` output channels from k0 on as filters[k][r][place of s][c], four words for c.
template <typename T, typename A>
__device__ __forceinline__ void stage_filters(A* filters, const BwdInputParams& params, int k0, int channels) {
  const ConvReluPoolShape& shape = params.args.shape;
  const Taps& taps = params.plan.taps;
  const int area = shape.R * shape.S;
  for (int i = threadIdx.x; i < channels * area; i += blockDim.x) {
    const int k = i / area, r = i % area / shape.S, s = i % shape.S;
    A* to = filters + k * params.plan.filter_plane + (r * taps.places() + taps.place(s)) * kQuad;
    for (int c = 0; c < shape.C; ++c) to[c] = widen(at<T>(params.args.w, k0 + k, c, r, s));
  }
}

template <typename T, int C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || C == kMaxChannels ? 1 : 2)
    conv_relu_pool_bwd_input_kernel(const __grid_constant__ BwdInputParams params) {
  using A = accumulator<T>;
  const ConvReluPoolShape& shape = params.args.shape;
  const BwdInputPlan& plan = params.plan;
  A* const g = dynamic_shared<A>();
  A* const filters = g + plan.staged * plan.plane;
  Windows* const over = reinterpret_cast<Windows*>(filters + plan.staged * plan.filter_plane);

  int block = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % plan.lanes;
  const int slice = thread / plan.lanes / plan.phases;
  const int phase = block % plan.phase_blocks * plan.phases + thread / plan.lanes % plan.phases;
  block /= plan.phase_blocks;
  const int b0 = plan.first.w + block % plan.tiles.w * plan.tile.w;
  block /= plan.tiles.w;
  const int a0 = plan.first.h + block % plan.tiles.h * plan.tile.h;
  const int n = block / plan.tiles.h;

  const bool live = phase < shape.stride.h * shape.stride.w;
  const int phase_h = phase / shape.stride.w, phase_w = phase % shape.stride.w;
  const int unit = min(lane, plan.units - 1);  // surplus lanes repeat the last one
  const int row = unit / plan.quads * kRows, column = unit % plan.quads * kQuad;

  const int j0 = b0 - plan.last.w;
  for (int i = threadIdx.x; i < plan.tile.w + plan.last.w; i += blockDim.x) {
    over[i] = windows_over(j0 + i, shape.OW, shape.pool_size.w, shape.pool_stride.w, shape.pool_padding.w, shape.PW);
  }
  int first_tap = 0;  // along h, of this phase
  while (first_tap < shape.R && first_tap * shape.dilation.h % shape.stride.h != phase_h) ++first_tap;
  __syncthreads();

  A sum[C][kRows][kQuad] = {};
  for (int k0 = 0; k0 < shape.K; k0 += plan.staged) {
    const int channels = min(plan.staged, shape.K - k0);
    stage_gradient<T>(g, over, params, n, k0, channels, a0 - plan.last.h, j0);
    stage_filters<T>(filters, params, k0, channels);
    __syncthreads();
    for (int k = slice; k < channels && live; k += plan.slices) {
      int shift = plan.last.h - first_tap * shape.dilation.h / shape.stride.h;
      for (int r = first_tap; r < shape.R; r += plan.next_tap) {
        const A* plane = g + k * plan.plane + (row + shift) * plan.pitch + column;
        const A* filter =
            filters + k * plan.filter_plane + (r * shape.stride.w + phase_w) * plan.taps.groups * kQuad * kQuad;
        correlate(sum, plane, plan.pitch, filter, kQuad, plan.taps, phase_w);
        shift -= plan.next_shift;
      }
    }
    __syncthreads();
  }

  // The slices add up in shared memory, one after the other.
  const int owners = plan.phases * plan.lanes, owner = thread % owners;
  for (int other = 1; other < plan.slices; ++other) {
#pragma unroll
    for (int v = 0; v < C * kRows * kQuad; ++v) {
      if (slice == other) g[v * owners + owner] = sum[v / (kRows * kQuad)][v / kQuad % kRows][v % kQuad];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < C * kRows * kQuad; ++v) {
      if (slice == 0) sum[v / (kRows * kQuad)][v / kQuad % kRows][v % kQuad] += g[v * owners + owner];
    }
    __syncthreads();
  }

  if (slice > 0 || !live || lane >= plan.units) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int h = (a0 + row + i) * shape.stride.h + phase_h - shape.padding.h;
    if (row + i >= plan.tile.h || h < 0 || h >= shape.H) continue;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int w = (b0 + column + j) * shape.stride.w + phase_w - shape.padding.w;
      if (column + j >= plan.tile.w || w < 0 || w >= shape.W) continue;
#pragma unroll
      for (int c = 0; c < C; ++c) at<T>(params.args.dx, n, c, h, w) = narrow<T>(sum[c][i][j]);
    }
  }
}

// A block of one tile of the phase planes. Sets `staged` to 0 if that does not fit shared memory.
BwdInputPlan plan_of(const ConvReluPoolShape& s, int word_bytes, Extent plane, Extent tile) {
  BwdInputPlan plan = {};
  plan.first = {s.padding.h / s.stride.h, s.padding.w / s.stride.w};
  plan.tile = tile;
  plan.tiles = {div_up(plane.h, tile.h), div_up(plane.w, tile.w)};
  plan.phase_blocks = div_up(s.stride.h * s.stride.w, kThreads / kWarp);
  plan.phases = div_up(s.stride.h * s.stride.w, plan.phase_blocks);
  plan.quads = div_up(tile.w, kQuad);
  plan.units = div_up(tile.h, kRows) * plan.quads;
  plan.lanes = round_up(plan.units, kWarp);
  plan.slices = std::min(s.K, std::max(1, kThreads / (plan.phases * plan.lanes)));

  plan.last = {(s.R - 1) * s.dilation.h / s.stride.h, (s.S - 1) * s.dilation.w / s.stride.w};
  plan.next_tap = s.stride.h / std::gcd(s.stride.h, s.dilation.h);
  plan.next_shift = plan.next_tap * s.dilation.h / s.stride.h;

  const int groups = tap_groups(s.S, s.stride.w, s.dilation.w);
  const int rows = round_up(tile.h, kRows) + plan.last.h;
  plan.pitch = conflict_free_pitch((plan.quads + groups) * kQuad, kRows, plan.quads * kQuad);
  const int64_t words = int64_t{rows} * plan.pitch;
  plan.plane = static_cast<int>(words);
  plan.filter_plane = s.R * s.stride.w * groups * kQuad * kQuad;

  const int64_t over_bytes = (tile.w + plan.last.w) * int64_t{sizeof(Windows)};
  const int64_t channel_bytes = (words + plan.filter_plane) * word_bytes;
  if (over_bytes > kMaxShared) return plan;
  plan.staged = static_cast<int>(std::min<int64_t>(s.K, (kMaxShared - over_bytes) / channel_bytes));
  const int64_t sum_bytes = int64_t{plan.phases} * plan.lanes * s.C * kRows * kQuad * word_bytes;
  plan.shared_bytes = std::max(over_bytes + plan.staged * channel_bytes, plan.slices > 1 ? sum_bytes : 0);
  return plan;
}

// Up to 64 threads share a tile, and the slices take the others: that spreads small images over more threads, and adds
// the many terms of a pixel in several short sums rather than one long one, which rounds less.
BwdInputPlan plan_bwd_input(const ConvReluPoolShape& s, int word_bytes) {
  const Extent plane = {(s.H - 1 + s.padding.h) / s.stride.h - s.padding.h / s.stride.h + 1,
                        (s.W - 1 + s.padding.w) / s.stride.w - s.padding.w / s.stride.w + 1};
  const int phases = plan_of(s, word_bytes, plane, {1, 1}).phases;
  const int units = phases == 1 ? 2 * kWarp : kWarp;
  const int widest = std::max(8, units / div_up(plane.h, kRows)) * kQuad;  // 8 quads read all 32 banks
  Extent tile = {0, div_up(plane.w, div_up(plane.w, widest))};
  tile.h = std::min(round_up(plane.h, kRows), units / div_up(tile.w, kQuad) * kRows);
  for (;;) {
    tile.h = round_up(div_up(plane.h, div_up(plane.h, tile.h)), kRows);
    BwdInputPlan plan = plan_of(s, word_bytes, plane, tile);
    const int64_t blocks = int64_t{s.N} * plan.tiles.h * plan.tiles.w * plan.phase_blocks;
    const bool enough = plan.staged > 0 && (blocks >= kMultiprocessors || plan.units <= kWarp);
    if (enough || (tile.h == kRows && tile.w <= kQuad)) {
      plan.taps = taps_of(s.S, s.stride.w, s.dilation.w, true);
      return plan;
    }
    if (tile.h > kRows) {
      tile.h /= 2;
    } else {
      tile.w = round_up(tile.w / 2, kQuad);
    }
  }
}

template <typename T>
auto kernel_for(int channels) {
  return channels == 1   ? conv_relu_pool_bwd_input_kernel<T, 1>
         : channels == 2 ? conv_relu_pool_bwd_input_kernel<T, 2>
         : channels == 3 ? conv_relu_pool_bwd_input_kernel<T, 3>
                         : conv_relu_pool_bwd_input_kernel<T, kMaxChannels>;
}

template <typename T>
cudaError_t launch_bwd_input(const ConvReluPoolBwdInput& args, cudaStream_t stream) {
  const BwdInputParams params = {args, plan_bwd_input(args.shape, sizeof(accumulator<T>))};
  const BwdInputPlan& plan = params.plan;
  const int64_t blocks = int64_t{args.shape.N} * plan.tiles.h * plan.tiles.w * plan.phase_blocks;
  return launch(kernel_for<T>(args.shape.C), blocks, plan.phases * plan.lanes * plan.slices, plan.shared_bytes, false,
                stream, params);
}

}  // namespace

bool conv_relu_pool_bwd_input_fits(const ConvReluPoolShape& shape, Dtype dtype) {
  return few_taps(shape) && plan_of(shape, word_bytes(dtype), {1, 1}, {kRows, kQuad}).staged > 0;
}

cudaError_t conv_relu_pool_bwd_input(const ConvReluPoolBwdInput& args, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return launch_bwd_input<float>(args, stream);
    case Dtype::float64:
      return launch_bwd_input<double>(args, stream);
    case Dtype::bfloat16:
      return launch_bwd_input<__nv_bfloat16>(args, stream);
    case Dtype::float16:
      return launch_bwd_input<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastarch
