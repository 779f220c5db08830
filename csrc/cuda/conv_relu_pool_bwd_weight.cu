// conv_relu_pool, gradient of the filters and the bias, for few input channels:
//
//   g[n, k, i, j]   = sum of dy[n, k, p, q] over the windows (p, q) that chose (i, j) as their maximum
//                     (mean: of dy / divisor over the windows in which (i, j) passed ReLU)
//   dw[k, c, r, s]  = sum_{n, i, j} g[n, k, i, j] x[n, c, i stride_h + r dilation_h - padding_h, ...]
//   db[k]           = sum_{n, i, j} g[n, k, i, j]
//
// x [N, C, H, W]; g [N, K, OH, OW], never in memory; dy and index [N, K, PH, PW]; dw [K, C, R, S]; db [K].
//
// Only maxima carry gradient: each costs one value times one patch of x, and what ReLU cut off costs nothing. A warp
// owns a channel k and its lanes own the taps, laid out so that a patch is read from shared memory without a bank
// conflict. Every block sums its share of the images; a second kernel adds these partial sums in a fixed order.
#include <algorithm>

#include "cuda/conv_relu_pool.cuh"

namespace fastarch {
namespace {

constexpr int kWarps = 16;
constexpr int kMaxWindow = 255;                    // elements that one byte of index can name
constexpr int kMostBlocks = 4 * kMultiprocessors;  // more would only cost more partial sums

struct BwdWeightPlan {
  Extent tile, tiles;            // pooled outputs in shared memory at a time; tiles that cover an image
  int channels, channel_blocks;  // of a block, one a warp; blocks that cover K
  int slices;                    // warps that share a channel, each with every slices-th group of 32 outputs
  int shares;                    // blocks that share the images and tiles of a channel block
  InputTile input;
  size_t shared_bytes;
};

struct BwdWeightParams {
  ConvReluPoolBwdWeight args;
  BwdWeightPlan plan;
};

// A gradient that stands at one element of conv: its value, and where its patch starts in shared memory.
template <typename A>
struct Entry {
  A value;
  int patch;
};

// A lane sums dw for the taps lane, lane + 32, ... of its warp's channel.
template <typename T, int LANE_TAPS>
__global__ void __launch_bounds__(kWarps* kWarp, sizeof(T) == 8 || LANE_TAPS > 5 ? 1 : 2)
    conv_relu_pool_bwd_weight_kernel(const __grid_constant__ BwdWeightParams params) {
  using A = accumulator<T>;
  const ConvReluPoolShape& shape = params.args.shape;
  const BwdWeightPlan& plan = params.plan;
  const ConstTensor4 &dy = params.args.dy, &index = params.args.index;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int block = blockIdx.x % plan.channel_blocks, share = blockIdx.x / plan.channel_blocks;
  const int k = block * plan.channels + warp % plan.channels, slice = warp / plan.channels;
  const int area = shape.R * shape.S, taps = shape.C * area;
  const int window = shape.pool_size.h * shape.pool_size.w;

  Entry<A>* const queue = dynamic_shared<Entry<A>>() + warp * kWarp;
  A* const x = reinterpret_cast<A*>(dynamic_shared<Entry<A>>() + blockDim.x);
  FASTARCH_SHARED(int, element_at, kMaxWindow);  // where the elements of a window stand in x, from its corner
  for (int i = threadIdx.x; i < window; i += blockDim.x) {
    element_at[i] = i / shape.pool_size.w * shape.stride.h * plan.input.pitch + i % shape.pool_size.w * shape.stride.w;
  }

  int tap_at[LANE_TAPS];
#pragma unroll
  for (int i = 0; i < LANE_TAPS; ++i) {
    const int tap = min(lane + i * kWarp, taps - 1);  // surplus lanes repeat the last tap: the same word, no conflict
    const int c = tap / area, r = tap % area / shape.S, s = tap % shape.S;
    tap_at[i] = c * plan.input.plane + r * shape.dilation.h * plan.input.pitch + s * shape.dilation.w;
  }

  A sum[LANE_TAPS] = {};
  double bias = 0;
  const int outputs = plan.tile.h * plan.tile.w;
  const int image_tiles = plan.tiles.h * plan.tiles.w;
  for (int64_t item = share; item < int64_t{shape.N} * image_tiles; item += plan.shares) {
    const int n = item / image_tiles, tile = item % image_tiles;
    const int p0 = tile / plan.tiles.w * plan.tile.h, q0 = tile % plan.tiles.w * plan.tile.w;
    __syncthreads();  // the tile before is used up
    stage_input<T, 2>(x, plan.input, params.args.x, shape, n, 0, shape.C,
                      (p0 * shape.pool_stride.h - shape.pool_padding.h) * shape.stride.h - shape.padding.h,
                      (q0 * shape.pool_stride.w - shape.pool_padding.w) * shape.stride.w - shape.padding.w);
    __syncthreads();

    Walk walk(plan.tile.w, plan.tile.h, slice * kWarp + lane, plan.slices * kWarp);
    for (int first = slice * kWarp; first < outputs; first += plan.slices * kWarp, walk.advance()) {
      const int row = walk.b, column = walk.a;
      const int p = p0 + row, q = q0 + column;
      const bool live = k < shape.K && first + lane < outputs && p < shape.PH && q < shape.PW;
      int code = 0;
      A gradient = 0;
      if (live) {
        code = at<uint8_t>(index, n, k, p, q);
        gradient = widen(at<T>(dy, n, k, p, q));
        if (shape.average) gradient /= static_cast<A>(mean_divisor(shape, p, q));
      }
      const int corner =
          row * shape.pool_stride.h * shape.stride.h * plan.input.pitch + column * shape.pool_stride.w * shape.stride.w;
      // A maximum stands at one element of its window; a mean at all that passed ReLU.
      for (int candidate = 0; candidate < (shape.average ? window : 1); ++candidate) {
        const int element = shape.average ? candidate : code;
        const bool carries = live && (shape.average ? code >> candidate & 1 : code < window);
        const unsigned carriers = __ballot_sync(~0u, carries);
        if (carries) {
          const Entry<A> entry = {gradient, corner + element_at[element]};
          queue[__popc(carriers & ((1u << lane) - 1))] = entry;
          bias += gradient;
        }
        __syncwarp();
        const int entries = __popc(carriers);
        A part[LANE_TAPS] = {};  // summing in groups keeps the rounding error small
#pragma unroll(LANE_TAPS <= 3 ? 4 : LANE_TAPS <= 12 ? 2 : 1)
        for (int e = 0; e < entries; ++e) {
          const Entry<A> entry = queue[e];
#pragma unroll
          for (int t = 0; t < LANE_TAPS; ++t) part[t] += entry.value * x[entry.patch + tap_at[t]];
        }
#pragma unroll
        for (int t = 0; t < LANE_TAPS; ++t) sum[t] += part[t];
        __syncwarp();  // before the queue is filled again
      }
    }
  }

  for (int bits = kWarp / 2; bits > 0; bits /= 2) bias += __shfl_xor_sync(~0u, bias, bits);
  if (k >= shape.K) return;
  A* const partial = static_cast<A*>(params.args.partial) +
                     ((static_cast<int64_t>(share) * plan.slices + slice) * shape.K + k) * (taps + 1);
#pragma unroll
  for (int t = 0; t < LANE_TAPS; ++t) {
    if (lane + t * kWarp < taps) partial[lane + t * kWarp] = sum[t];
  }
  if (lane == 0) partial[taps] = static_cast<A>(bias);
}

// dw[k, tap] and db[k] = the sum over `rows` of partial[row, k, tap]; tap C R S is the bias.
struct BwdWeightSumParams {
  const void* partial;
  void *dw, *db;
  int rows, K, taps;
};

constexpr int kSumThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    conv_relu_pool_bwd_weight_sum_kernel(const __grid_constant__ BwdWeightSumParams params) {
  using A = accumulator<T>;
  constexpr int SLICES = kSumThreads / kWarp;
  FASTARCH_SHARED(double, part, kSumThreads);
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t columns = static_cast<int64_t>(params.K) * (params.taps + 1);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;

  double sum = 0;
  if (column < columns) {
    const A* partial = static_cast<const A*>(params.partial) + column;
#pragma unroll 4
    for (int row = slice; row < params.rows; row += SLICES) sum += partial[row * columns];
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || column >= columns) return;
  for (int other = 1; other < SLICES; ++other) sum += part[other * kWarp + lane];

  const int64_t k = column / (params.taps + 1);
  const int tap = static_cast<int>(column % (params.taps + 1));
  if (tap == params.taps) {
    if (params.db != nullptr) static_cast<T*>(params.db)[k] = narrow<T>(static_cast<A>(sum));
  } else if (params.dw != nullptr) {
    static_cast<T*>(params.dw)[k * params.taps + tap] = narrow<T>(static_cast<A>(sum));
  }
}

// The plan for one tile of y; sets `shared_bytes` to 0 if that does not fit.
BwdWeightPlan plan_of(const ConvReluPoolShape& s, int word_bytes, Extent tile) {
  BwdWeightPlan plan = {};
  plan.tile = tile;
  plan.tiles = {div_up(s.PH, tile.h), div_up(s.PW, tile.w)};
  plan.channel_blocks = div_up(s.K, kWarps);
  plan.channels = div_up(s.K, plan.channel_blocks);
  plan.slices = std::max(1, std::min(kWarps / plan.channels, tile.h * tile.w / kWarp));
  const int64_t items = int64_t{s.N} * plan.tiles.h * plan.tiles.w;
  const int most = div_up(kMostBlocks, plan.channel_blocks);
  plan.shares = items > most ? static_cast<int>(div_up(items, div_up(items, most))) : static_cast<int>(items);

  plan.input.size = seen_by(under(tile, s), s);
  plan.input.phases = {1, 1};
  plan.input.pitch = plan.input.size.w;
  int64_t plane = int64_t{plan.input.size.h} * plan.input.pitch;
  if (s.dilation.h == 1 && s.dilation.w == 1) {
    // A step along the taps is then always a step to the next bank, from row to row and channel to channel too.
    plan.input.pitch += ((s.S - plan.input.pitch) % 32 + 32) % 32;
    plane = int64_t{plan.input.size.h} * plan.input.pitch;
    plane += ((s.R * s.S - plane) % 32 + 32) % 32;
  }
  plan.input.plane = static_cast<int>(plane);
  const int64_t queue_bytes = int64_t{plan.channels} * plan.slices * kWarp * 2 * word_bytes;
  const int64_t bytes = queue_bytes + s.C * plane * word_bytes;
  plan.shared_bytes = bytes <= kMaxShared ? bytes : 0;
  return plan;
}

// Halve the tile until it fits and there is enough to share out.
BwdWeightPlan plan_bwd_weight(const ConvReluPoolShape& s, int word_bytes) {
  Extent tile = {s.PH, s.PW};
  for (;;) {
    const BwdWeightPlan plan = plan_of(s, word_bytes, tile);
    const int64_t items = int64_t{s.N} * plan.tiles.h * plan.tiles.w;
    const bool many = items * plan.channel_blocks >= kMostBlocks / 2 || tile.h * tile.w <= 4 * kWarp;
    if ((plan.shared_bytes > 0 && many) || tile.h * tile.w == 1) return plan;
    const Extent seen = plan.input.size;
    const bool tall = tile.w == 1 || (tile.h > 1 && seen.h >= seen.w);
    (tall ? tile.h : tile.w) = div_up(tall ? tile.h : tile.w, 2);
  }
}

// The kernel whose lanes hold at least `lane_taps` taps each.
template <typename T>
auto kernel_for(int lane_taps) {
  return lane_taps <= 1    ? conv_relu_pool_bwd_weight_kernel<T, 1>
         : lane_taps <= 2  ? conv_relu_pool_bwd_weight_kernel<T, 2>
         : lane_taps <= 3  ? conv_relu_pool_bwd_weight_kernel<T, 3>
         : lane_taps <= 5  ? conv_relu_pool_bwd_weight_kernel<T, 5>
         : lane_taps <= 8  ? conv_relu_pool_bwd_weight_kernel<T, 8>
         : lane_taps <= 12 ? conv_relu_pool_bwd_weight_kernel<T, 12>
                           : conv_relu_pool_bwd_weight_kernel<T, kMaxTaps / kWarp>;
}

template <typename T>
cudaError_t launch_bwd_weight(const ConvReluPoolBwdWeight& args, cudaStream_t stream) {
  const ConvReluPoolShape& shape = args.shape;
  const int taps = shape.C * shape.R * shape.S;
  const BwdWeightParams params = {args, plan_bwd_weight(shape, sizeof(accumulator<T>))};
  const BwdWeightPlan& plan = params.plan;
  const cudaError_t error = launch(kernel_for<T>(div_up(taps, kWarp)), int64_t{plan.shares} * plan.channel_blocks,
                                   plan.channels * plan.slices * kWarp, plan.shared_bytes, false, stream, params);
  if (error != cudaSuccess) return error;
  const BwdWeightSumParams sum = {args.partial, args.dw, args.db, plan.shares * plan.slices, shape.K, taps};
  return launch(conv_relu_pool_bwd_weight_sum_kernel<T>, div_up(shape.K * (taps + int64_t{1}), kWarp), kSumThreads, 0,
                false, stream, sum);
}

}  // namespace

bool conv_relu_pool_bwd_weight_fits(const ConvReluPoolShape& shape, Dtype dtype) {
  return few_taps(shape) && plan_of(shape, word_bytes(dtype), {1, 1}).shared_bytes > 0;
}

int conv_relu_pool_bwd_weight_partials(const ConvReluPoolShape& shape, Dtype dtype) {
  const BwdWeightPlan plan = plan_bwd_weight(shape, word_bytes(dtype));
  return plan.shares * plan.slices;
}

cudaError_t conv_relu_pool_bwd_weight(const ConvReluPoolBwdWeight& args, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return launch_bwd_weight<float>(args, stream);
    case Dtype::float64:
      return launch_bwd_weight<double>(args, stream);
    case Dtype::bfloat16:
      return launch_bwd_weight<__nv_bfloat16>(args, stream);
    case Dtype::float16:
      return launch_bwd_weight<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastarch
