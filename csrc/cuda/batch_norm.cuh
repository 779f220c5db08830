// What forward and backward of batch_norm share: how rows are dealt out, kept on chip and merged.
//
// Both passes have two phases, sums over the rows and then something for every row, with the whole grid's barrier
// between them. A block keeps the rows of the first phase in shared memory, so that the second does not read them from
// DRAM again: on an H200 132 x 216 KB = 29 MB. A slice of 64 channels of 64x256x56x56 in bfloat16 is 26 MB, so slices
// are worked through one after another, each by the whole chip (in small tensors several at a time).
//
// The barrier is that of cooperative_groups: it needs no memory that somebody has to clear or that two streams could
// share. A slice is 6 us of DRAM traffic one way, the barrier 1 to 2 us, and while the grid waits in it L2 already
// fetches the beginning of the next slice.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <cstring>

#include "cuda/batch_norm.h"
#include "cuda/kernel.h"

namespace fastarch {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kOctet = 8;         // neighbouring channels that a thread owns: 16 bytes of 16 bits each, 1 of the mask
constexpr int kSliceBytes = 128;  // of a row of a slice: a line of the caches
constexpr int kMaxChannels = 64;  // of a slice
constexpr int kInFlight = 64;     // bytes of a tensor that a thread loads at a time: 32 KB a multiprocessor
constexpr double kL2Share = 0.5;  // of L2 that is counted on to still hold what was read last

struct Sums {
  double a, b;
};

// The part of shared memory that holds no rows.
struct alignas(16) Scratch {
  union {
    float2 warp[kWarps][kMaxChannels];
    Sums part[kThreads];
  };
  float warp_rows[kWarps];
  float constant[3][kMaxChannels];
};

template <typename T>
struct alignas(16) Octet {
  T v[kOctet];
};

// Octets of a tensor that a thread loads before it uses the first. Without alignment each is eight loads with a
// condition of their own.
template <typename T, bool ALIGNED>
constexpr int kBatch = ALIGNED ? kInFlight / sizeof(Octet<T>) : 1;

template <typename T>
constexpr int kPieces = sizeof(Octet<T>) / sizeof(uint4);  // words of 16 bytes

// Of one octet in memory, the first `live` elements; !ALIGNED: C is no multiple of 8 or the tensor not of 16 bytes.
// LAST: it will not be read again, and leaves L2 before others.
template <bool ALIGNED, bool LAST, typename T>
__device__ __forceinline__ Octet<T> load(const T* from, int live) {
  Octet<T> octet;
  if (ALIGNED) {
    uint4 piece[kPieces<T>];
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      const uint4* at = reinterpret_cast<const uint4*>(from) + i;
      piece[i] = LAST ? __ldcs(at) : __ldcg(at);
    }
    memcpy(&octet, piece, sizeof(octet));
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet.v[i] = i < live ? from[i] : T{};
  }
  return octet;
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store(T* to, const Octet<T>& octet, int live) {
  if (ALIGNED) {
    uint4 piece[kPieces<T>];
    memcpy(piece, &octet, sizeof(octet));
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, piece[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < live) to[i] = octet.v[i];
    }
  }
}

// Slot `slot` of a thread's octets in shared memory: 16-byte words side by side over the block, without bank conflicts.
template <typename T>
__device__ __forceinline__ void keep(uint4* kept, int slot, const Octet<T>& octet) {
  uint4 piece[kPieces<T>];
  memcpy(piece, &octet, sizeof(octet));
#pragma unroll
  for (int i = 0; i < kPieces<T>; ++i) kept[(slot * kPieces<T> + i) * kThreads + threadIdx.x] = piece[i];
}

template <typename T>
__device__ __forceinline__ Octet<T> recall(const uint4* kept, int slot) {
  uint4 piece[kPieces<T>];
#pragma unroll
  for (int i = 0; i < kPieces<T>; ++i) piece[i] = kept[(slot * kPieces<T> + i) * kThreads + threadIdx.x];
  Octet<T> octet;
  memcpy(&octet, piece, sizeof(octet));
  return octet;
}

// A thread's part of a slice: one octet in each of `tiles` rows.
struct Part {
  int channel, live;          // the first channel, and how many of the eight exist
  int share, tiles;           // the block's share of the rows, and the thread's tiles
  int64_t row, step;          // the row in the first tile, and from tile to tile
  int64_t offset, pitch;      // of elements, likewise
  int64_t octet, mask_pitch;  // of bytes in the mask, likewise

  __device__ __forceinline__ Part(const BatchNormPlan& plan, int64_t M, int C, int round) {
    const int slice = round * plan.groups + blockIdx.x / plan.shares;
    const int tile_rows = kThreads / plan.lanes, octets = div_up(C, kOctet);
    share = blockIdx.x % plan.shares;
    channel = (slice * plan.lanes + threadIdx.x % plan.lanes) * kOctet;
    live = max(0, min(kOctet, C - channel));
    row = static_cast<int64_t>(share) * tile_rows + threadIdx.x / plan.lanes;
    step = static_cast<int64_t>(plan.shares) * tile_rows;
    tiles = live == 0 || row >= M ? 0 : static_cast<int>(div_up(M - row, step));
    offset = row * C + channel;
    pitch = step * C;
    octet = row * octets + channel / kOctet;
    mask_pitch = step * octets;
  }
};

// Fetch an element's line to L2.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if !defined(CUDA_ON_CPU)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// The first TILES tiles: one batch of a tensor is 4 MB over 132 multiprocessors, 1 us of DRAM traffic.
template <int TILES, typename T>
__device__ __forceinline__ void prefetch(const T* tensor, const Part& part) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    if (i < part.tiles) prefetch(tensor + part.offset + i * part.pitch);
  }
}

// The totals of a block's sums, by channel: thread i holds sums of the slice's channel i % channels, and with i below
// `channels` gets that channel's total, in an order that is always the same.
__device__ __forceinline__ Sums total_of(Sums sums, Scratch& scratch, int channels) {
  const int thread = threadIdx.x;
  scratch.part[thread] = sums;
  __syncthreads();
  Sums total = {};
  if (thread < channels) {
    for (int i = thread; i < kThreads; i += channels) {
      total.a += scratch.part[i].a;
      total.b += scratch.part[i].b;
    }
  }
  return total;
}

// Rows of a share.
__device__ __forceinline__ int64_t rows_of(const BatchNormPlan& plan, int share) {
  const int last = (plan.longer == 0 ? plan.shares : plan.longer) - 1;  // has the last tile
  const int64_t tiles = plan.tiles + (share < plan.longer);
  return tiles * (kThreads / plan.lanes) - (share == last ? plan.missing : 0);
}

__device__ __forceinline__ float rstd_of(float var, float eps) { return 1.0f / sqrtf(var + eps); }

// Before residual and ReLU; backward computes it again, and has to find the same sign.
__device__ __forceinline__ float normalised(float x, float mean, float scale, float bias) {
  return fmaf(x - mean, scale, bias);
}

__device__ __forceinline__ bool passes(float z) { return !(z <= 0); }  // NaN does

// Whether 16 bytes can be moved at a time.
inline bool is_aligned(const void* tensor) { return reinterpret_cast<uintptr_t>(tensor) % sizeof(uint4) == 0; }

// f(a value of the type that holds `dtype`).
template <typename F>
cudaError_t with_storage(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
    case Dtype::float16:
      return f(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

// `tensors` octets of T are kept for each row; `kernel` is what will be launched.
template <typename T, typename... Params>
cudaError_t plan_batch_norm(void (*kernel)(Params...), int64_t M, int C, int tensors, BatchNormPlan& plan) {
  int device = 0, multiprocessors = 0, shared = 0, l2 = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  get(multiprocessors, cudaDevAttrMultiProcessorCount);
  get(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(l2, cudaDevAttrL2CacheSize);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared);
  if (error != cudaSuccess) return error;
  blocks *= multiprocessors;  // no more than these can wait for each other
  if (blocks == 0) return cudaErrorCooperativeLaunchTooLarge;

  constexpr int kFull = kSliceBytes / sizeof(Octet<T>);
  const int octets = div_up(C, kOctet);
  const int64_t tile_bytes = static_cast<int64_t>(tensors) * kThreads * sizeof(Octet<T>);
  const int64_t most = tensors == 0 ? 0 : std::max<int64_t>(0, shared - int64_t{sizeof(Scratch)}) / tile_bytes;
  const auto tiles_of = [&](int lanes) { return div_up(M, kThreads / lanes); };

  plan = {};
  plan.lanes = kFull;
  while (plan.lanes / 2 >= octets) plan.lanes /= 2;
  if (plan.lanes == kFull) {
    // Half as wide where that leaves an eighth of the lanes less idle, or L2 could not hold what the blocks do not
    // keep.
    const int saved = round_up(octets, kFull) - round_up(octets, kFull / 2);
    const int64_t twice = (tiles_of(kFull) - most * blocks) * tile_bytes;
    if (saved * 8 >= round_up(octets, kFull) || twice > kL2Share * l2) plan.lanes /= 2;
  }
  plan.slices = div_up(octets, plan.lanes);

  // As many slices at a time as stay on chip: the fewer rounds, the fewer barriers.
  const int64_t tiles = tiles_of(plan.lanes);
  const int64_t needed = most == 0 ? blocks : std::min<int64_t>(blocks, div_up(tiles, most));
  const int at_once = std::min<int64_t>(plan.slices, blocks / needed);
  plan.rounds = div_up(plan.slices, at_once);
  plan.groups = div_up(plan.slices, plan.rounds);
  const int64_t useful = div_up(tiles, kBatch<T, true>);  // more blocks would only merge more sums
  plan.shares = static_cast<int>(std::min<int64_t>(blocks / plan.groups, useful));
  plan.tiles = static_cast<int>(tiles / plan.shares);
  plan.longer = static_cast<int>(tiles % plan.shares);
  plan.missing = static_cast<int>(tiles * (kThreads / plan.lanes) - M);
  plan.kept = static_cast<int>(std::min<int64_t>(most, plan.tiles + (plan.longer > 0)));
  plan.shared_bytes = sizeof(Scratch) + plan.kept * tile_bytes;
  return cudaSuccess;
}

}  // namespace fastarch
