// What forward and backward of gru share: weights that stay on chip, the product with them, and how blocks meet.
//
// A step is one product with the recurrent weights. They are the left operand, in a block's shared memory from the
// first step to the last, in the order in which the tensor cores take them; the right operand is what all blocks of a
// batch slice made in the step before, read from L2 straight into registers. A block's warps share the inner dimension
// of that product, so that none reads what another has read, and add up through shared memory; a thread then finishes
// one unit of one sequence, in float32.
//
// Which element of the inner dimension meets which is free as long as both operands agree. 64 bytes of a row go to four
// neighbouring lanes, 16 bytes each: two tensor-core products, whatever the type.
//
// Sizes come from counting; nothing here was measured, for no GPU was at hand (2026-11-25).
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/gru.h"
#include "cuda/kernel.h"

namespace fastarch {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnits = 16;                // rows of a tensor-core product
constexpr int kColumns = 8;               // its columns: sequences
constexpr int kGates = 3;                 // r, z, n
constexpr int kChunkBytes = 64;           // of a row
constexpr int kPitch = 20;                // words from column to column of a tile of sums: no bank conflicts
constexpr int kTile = kColumns * kPitch;  // words
constexpr int kInFlight = 4;              // chunks that a warp loads before it uses the first
constexpr int kBatch = 8;                 // weights that a thread loads before it stores the first
constexpr int kLine = 128;                // bytes between counters: a cache line each

template <typename T>
constexpr int kChunk = kChunkBytes / int{sizeof(T)};  // elements

// Elements of a row of [H], padded to whole chunks with zeros.
template <typename T>
__host__ __device__ constexpr int padded(int H) {
  return round_up(H, kChunk<T>);
}

// Two units' weights for two neighbouring words of the inner dimension: (unit, word) is (0, 0), (8, 0), (0, 1), (8, 1).
struct alignas(16) Quad {
  float v[4];
};

// sum += weights times what was exchanged, one product of the tensor cores: 16 units, 8 sequences, 8 words.
template <typename T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
#if defined(CUDA_ON_CPU)
  cuda_on_cpu::mma<T>(sum, a, b0, b1);
#else
#define FASTARCH_MMA(shape_and_types)                                                                                 \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                               \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, float>) {
    FASTARCH_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    FASTARCH_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    FASTARCH_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
#undef FASTARCH_MMA
#endif
}

// What the products multiply: the storage type or, for tensor cores in float32, the nearest TF32, which has 10 bits of
// mantissa (the tensor cores would cut the rest off, twice the error).
template <typename T, bool TENSOR>
__device__ __forceinline__ T operand(float value) {
  if constexpr (TENSOR && std::is_same_v<T, float>) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    bits = (bits + 0x1000) & ~0x1fffu;
    float rounded;
    memcpy(&rounded, &bits, sizeof(rounded));
    return value != value ? value : rounded;
  } else {
    return narrow<T>(value);
  }
}

// Where weight (row, k) of a block stands in its shared memory, in elements. Rows come in tiles of 16, of which TILES
// are multiplied with the same right operand.
template <typename T, bool TENSOR, int TILES>
__device__ __forceinline__ int place(int row, int k, int chunks) {
  constexpr int kWord = 4 / int{sizeof(T)};  // elements
  const int tile = row / kUnits, unit = row % 8, upper = row % kUnits / 8;
  const int word = k % kChunk<T> / kWord, owner = word / 4, product = word % 4 / 2, half = word % 2;
  // Tensor cores: lane unit * 4 + owner takes 16 bytes. FMA: lanes of the same unit take the same, those of eight units
  // 128 neighbouring bytes.
  const int slot = TENSOR ? unit * 4 + owner : owner * 8 + unit;
  const int quad = (((tile / TILES * chunks + k / kChunk<T>)*TILES + tile % TILES) * 2 + product) * kWarp + slot;
  return (quad * 4 + half * 2 + upper) * kWord + k % kWord;
}

// sum[m][n] += of this warp's part of the inner dimension, weight tile m times 8 columns n. Lane (g, q) = (lane / 4,
// lane % 4) holds of a tile (unit, column) = (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). `rows` is the first
// column's row in the exchange, `scratch` the warp's own.
template <typename T, bool TENSOR, int TILES, int COLUMNS>
__device__ __forceinline__ void multiply(float (&sum)[TILES][COLUMNS][4], const uint4* weights, const T* rows,
                                         int chunks, float* scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const uint4* const from = reinterpret_cast<const uint4*>(rows) + int64_t{g} * chunks * 4 + q;
  for (int begin = warp; begin < chunks; begin += kWarps * kInFlight) {
    uint4 h[kInFlight][COLUMNS];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int chunk = begin + i * kWarps;
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        if (chunk < chunks) h[i][n] = __ldcg(from + (int64_t{n} * kColumns * chunks + chunk) * 4);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int chunk = begin + i * kWarps;
      if (chunk >= chunks) break;
      const uint4* const a = weights + chunk * TILES * 2 * kWarp;
      if constexpr (TENSOR) {
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          const uint4 first = a[m * 2 * kWarp + lane], second = a[(m * 2 + 1) * kWarp + lane];
#pragma unroll
          for (int n = 0; n < COLUMNS; ++n) {
            mma<T>(sum[m][n], first, h[i][n].x, h[i][n].y);
            mma<T>(sum[m][n], second, h[i][n].z, h[i][n].w);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
          *reinterpret_cast<uint4*>(scratch + n * kTile + g * kPitch + q * 4) = h[i][n];
        }
        __syncwarp();
#pragma unroll
        for (int owner = 0; owner < 4; ++owner) {
          Quad column[COLUMNS][2];
#pragma unroll
          for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              column[n][j] = *reinterpret_cast<const Quad*>(scratch + n * kTile + (2 * q + j) * kPitch + owner * 4);
            }
          }
#pragma unroll
          for (int m = 0; m < TILES; ++m) {
#pragma unroll
            for (int product = 0; product < 2; ++product) {
              const Quad w = reinterpret_cast<const Quad*>(a)[(m * 2 + product) * kWarp + owner * 8 + g];
#pragma unroll
              for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  const Quad& x = column[n][j % 2];
                  sum[m][n][j] = fmaf(w.v[j / 2], x.v[product * 2], sum[m][n][j]);
                  sum[m][n][j] = fmaf(w.v[j / 2 + 2], x.v[product * 2 + 1], sum[m][n][j]);
                }
              }
            }
          }
        }
        __syncwarp();
      }
    }
  }
}

// A thread's unit of one sequence, in pass `pass` of a step: a block's tiles times its columns, 8 COLUMNS at a time.
struct Place {
  int n, unit;
  bool exists;

  template <int COLUMNS>
  static __device__ __forceinline__ Place of(const GruPlan& plan, const GruWalk& walk, int pass) {
    constexpr int kElements = kUnits * kColumns * COLUMNS;
    const int column = pass / plan.tiles * kColumns * COLUMNS + threadIdx.x / kUnits;
    Place place;
    place.n = blockIdx.x / plan.unit_slices * plan.rows + column;
    place.unit = (blockIdx.x % plan.unit_slices * plan.tiles + pass % plan.tiles) * kUnits + threadIdx.x % kUnits;
    place.exists = threadIdx.x < kElements && place.n < walk.N && place.unit < walk.H;
    return place;
  }
  __device__ __forceinline__ int64_t offset(const GruWalk& walk) const { return int64_t{n} * walk.H + unit; }
};

// sum[m] of the thread's element, which all warps have a part of; all of the block's threads call this together, and
// again only after a barrier.
template <typename T, bool TENSOR, int TILES, int COLUMNS>
__device__ __forceinline__ void total(float (&sum)[TILES], const uint4* weights, const T* rows, int chunks,
                                      float* scratch) {
  constexpr int kPart = TILES * COLUMNS * kTile;  // of a warp
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  float* const own = scratch + threadIdx.x / kWarp * kPart;
  float part[TILES][COLUMNS][4] = {};
  multiply<T, TENSOR, TILES, COLUMNS>(part, weights, rows, chunks, own);
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        own[(m * COLUMNS + n) * kTile + (2 * q + j % 2) * kPitch + g + j / 2 * 8] = part[m][n][j];
      }
    }
  }
  __syncthreads();
  const int column = threadIdx.x / kUnits;
  if (column >= kColumns * COLUMNS) return;
  const float* const from = scratch + column * kPitch + threadIdx.x % kUnits;
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
    sum[m] = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum[m] += from[warp * kPart + m * COLUMNS * kTile];
  }
}

// The barrier among the blocks of a batch slice, in two halves, for work that nobody waits for to stand between them.
// Each block's first thread says that it has come; `times` counts from 1. What the block's threads wrote before a
// __syncthreads that came before `arrive` is then seen, past L1, by what follows the __syncthreads in `wait`.
struct Meeting {
  unsigned* counter;
  unsigned blocks, times;

  __device__ __forceinline__ void arrive() {
    ++times;
    if (threadIdx.x != 0) return;
#if defined(CUDA_ON_CPU)
    ++*counter;
#else
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#endif
  }

  __device__ __forceinline__ unsigned seen() const {
#if defined(CUDA_ON_CPU)
    cuda_on_cpu::pause();
    return *counter;
#else
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
#endif
  }

  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0) {
      while (seen() < times * blocks) {
      }
    }
    __syncthreads();
  }
};

__device__ __forceinline__ Meeting meeting_of(const GruPlan& plan, unsigned* counters) {
  const int slice = blockIdx.x / plan.unit_slices;
  return {counters + slice * (kLine / sizeof(unsigned)), static_cast<unsigned>(plan.unit_slices), 0};
}

// Steps of sequence n.
__device__ __forceinline__ int64_t length_of(const GruWalk& walk, int n) {
  return walk.lengths == nullptr ? walk.T : min(max(walk.lengths[n], int64_t{0}), walk.T);
}

// f(a value of the type that holds `dtype`, whether tensor cores multiply).
template <typename F>
cudaError_t with_arithmetic(Dtype dtype, bool tf32, F f) {
  switch (dtype) {
    case Dtype::float32:
      return tf32 ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
    case Dtype::bfloat16:
      return f(__nv_bfloat16{}, std::true_type{});
    case Dtype::float16:
      return f(__half{}, std::true_type{});
    default:
      return cudaErrorInvalidValue;
  }
}

// One block on a multiprocessor: as few units in each as the device allows, then as few sequences. `chunks` in a row,
// products with the weights in `tiles` tiles at once. fastarch/ops/gru.py counts likewise before it calls.
inline GruPlan spread(const GruWalk& walk, int chunks, int tiles, int multiprocessors, int64_t shared) {
  const int units = div_up(walk.H, kUnits);
  GruPlan plan = {};
  plan.chunks = chunks;
  plan.tiles = div_up(units, multiprocessors);
  const int64_t weights = int64_t{plan.tiles} * tiles * chunks * 2 * kWarp * int64_t{sizeof(uint4)};
  const auto bytes = [&](int columns) { return weights + int64_t{kWarps} * tiles * columns * kTile * 4; };
  if (bytes(1) > shared) return plan;
  const int slices = div_up(units, plan.tiles);
  const int most = std::max(1, multiprocessors / slices), eights = div_up(walk.N, kColumns);
  plan.columns = eights > most && bytes(2) <= shared ? 2 : 1;
  plan.rows = round_up(div_up(eights, most), plan.columns) * kColumns;
  plan.unit_slices = slices;
  plan.batch_slices = div_up(walk.N, plan.rows);
  plan.shared_bytes = static_cast<size_t>(bytes(plan.columns));
  plan.exchange_bytes = int64_t{2} * plan.batch_slices * plan.rows * chunks * kChunkBytes;
  plan.counter_bytes = int64_t{plan.batch_slices} * kLine;
  return plan;
}

inline cudaError_t plan_gru(const GruWalk& walk, int chunks, int tiles, GruPlan& plan) {
  int device = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  get(multiprocessors, cudaDevAttrMultiProcessorCount);
  get(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) plan = spread(walk, chunks, tiles, multiprocessors, shared);
  return error;
}

// Elements of one of the two halves of the exchange.
template <typename T>
__host__ __device__ int64_t half_of(const GruPlan& plan) {
  return int64_t{plan.batch_slices} * plan.rows * plan.chunks * kChunk<T>;
}

}  // namespace fastarch
