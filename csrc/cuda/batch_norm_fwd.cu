// batch_norm, forward, with the batch's own statistics:
//
//   mean[c] = sum_m x[m, c] / M,   var[c] = sum_m (x[m, c] - mean[c])^2 / M
//   z[m, c] = (x[m, c] - mean[c]) (weight[c] / sqrt(var[c] + eps)) + bias[c] + residual[m, c]
//   y[m, c] = z[m, c], or max(z[m, c], 0)
//
// x, residual, y [M, C]; bit c % 8 of mask[m, c / 8] says that z[m, c] is not <= 0.
//
// One kernel reads x once: a thread follows eight channels down its rows and keeps what it reads in shared memory; when
// the grid has met, it finishes those rows from there. Rows for which there is no room are read last and finished
// first, so that L2 still has them. Mean and sum of squares are Welford's in a thread and merged as Chan et al. 1983
// do, in double: nothing cancels, however large the mean.
#include "cuda/batch_norm.cuh"

namespace fastarch {
namespace {

struct FwdParams {
  BatchNormFwd args;
  BatchNormPlan plan;
  float2* partial;  // [shares, C]: mean, and sum of squared differences from it
};

// 1 / n to the last bit or nearly so, exact for 1, without the branch of a division: that would part one row's
// arithmetic from the next one's.
__device__ __forceinline__ float reciprocal(float n) {
  const float guess = __fdividef(1.0f, n);
  return fmaf(guess, fmaf(-n, guess, 1.0f), guess);
}

struct Moments {
  float rows, mean[kOctet], squares[kOctet];

  // A row, or nothing; without a branch, behind which the compiler would move the loads of the rows that follow.
  template <typename T>
  __device__ __forceinline__ void add(const Octet<T>& x, bool live) {
    if (live) rows += 1;
    const float weight = reciprocal(rows);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float value = live ? widen(x.v[i]) : mean[i], difference = value - mean[i];
      mean[i] = fmaf(difference, weight, mean[i]);
      squares[i] = fmaf(difference, value - mean[i], squares[i]);
    }
  }

  // Those of the warp's threads that own the same channels, in the first `lanes` threads.
  __device__ __forceinline__ void merge(int lanes) {
    for (int bits = lanes; bits < kWarp; bits *= 2) {
      const float others = __shfl_xor_sync(~0u, rows, bits);
      const float weight = others > 0 ? others / (rows + others) : 0;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float difference = __shfl_xor_sync(~0u, mean[i], bits) - mean[i];
        squares[i] += __shfl_xor_sync(~0u, squares[i], bits) + difference * difference * rows * weight;
        mean[i] += difference * weight;
      }
      rows += others;
    }
  }
};

// Moments of many parts around a value near them, `pivot`: sums of n (mean - pivot) and of squares around the pivot.
// In double, because what has to be taken off at the end is up to as many times too large as there are parts.
__device__ __forceinline__ void add(Sums& sums, float2 moments, double rows, double pivot) {
  const double difference = moments.x - pivot;
  sums.a += rows * difference;
  sums.b += moments.y + rows * difference * difference;
}

__device__ __forceinline__ float2 moments_of(const Sums& sums, double rows, double pivot) {
  const double squares = sums.b - sums.a * sums.a / rows;
  return {static_cast<float>(pivot + sums.a / rows), static_cast<float>(squares < 0 ? 0 : squares)};
}

// First phase, tiles [begin, end).
template <bool ALIGNED, bool KEEP, typename T>
__device__ __forceinline__ void read_tiles(Moments& moments, const T* x, const Part& part, uint4* kept, int begin,
                                           int end) {
  constexpr int BATCH = kBatch<T, ALIGNED>;
  const T* from = x + part.offset + begin * part.pitch;
  for (int tile = begin; tile < end; tile += BATCH, from += BATCH * part.pitch) {
    Octet<T> batch[BATCH] = {};
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (tile + i < end) batch[i] = load<ALIGNED, KEEP>(from + i * part.pitch, part.live);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (KEEP && tile + i < end) keep(kept, tile + i, batch[i]);
      moments.add(batch[i], tile + i < end);
    }
  }
}

// Second phase, tiles [begin, end), the last first: of those it reads again, L2 has the last for certain.
template <bool ALIGNED, bool KEPT, typename T>
__device__ __forceinline__ void write_tiles(const BatchNormFwd& args, const float (&mean)[kOctet],
                                            const float (&scale)[kOctet], const float (&bias)[kOctet], const Part& part,
                                            const uint4* kept, int begin, int end) {
  constexpr int BATCH = kBatch<T, ALIGNED>;
  const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  T* const y = static_cast<T*>(args.y);
  for (int tile = end - 1; tile >= begin; tile -= BATCH) {
    Octet<T> batch[BATCH], added[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int slot = max(tile - i, begin);
      const int64_t from = part.offset + slot * part.pitch;
      batch[i] = KEPT ? recall<T>(kept, slot) : load<ALIGNED, true>(x + from, part.live);
      added[i] = residual == nullptr ? Octet<T>{} : load<ALIGNED, true>(residual + from, part.live);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int slot = max(tile - i, begin);
      unsigned passed = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float z = normalised(widen(batch[i].v[j]), mean[j], scale[j], bias[j]) + widen(added[i].v[j]);
        if (passes(z) && (ALIGNED || j < part.live)) passed |= 1u << j;
        batch[i].v[j] = narrow<T>(args.relu && !passes(z) ? 0.0f : z);
      }
      store<ALIGNED>(y + part.offset + slot * part.pitch, batch[i], part.live);
      if (args.mask != nullptr) args.mask[part.octet + slot * part.mask_pitch] = passed;
    }
  }
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, 1) batch_norm_fwd_kernel(const __grid_constant__ FwdParams params) {
  const BatchNormFwd& args = params.args;
  const BatchNormPlan& plan = params.plan;
  Scratch& scratch = *dynamic_shared<Scratch>();
  uint4* const kept = reinterpret_cast<uint4*>(&scratch + 1);
  const T* const x = static_cast<const T*>(args.x);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int channels = plan.lanes * kOctet;

  for (int round = 0; round < plan.rounds; ++round) {
    const Part part(plan, args.M, args.C, round);
    const int first = part.channel - thread % plan.lanes * kOctet;  // channel of the slice
    const int room = min(plan.kept, part.tiles);

    Moments moments = {};
    read_tiles<ALIGNED, true>(moments, x, part, kept, 0, room);
    read_tiles<ALIGNED, false>(moments, x, part, kept, room, part.tiles);
    moments.merge(plan.lanes);
    if (lane < plan.lanes) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        scratch.warp[warp][lane * kOctet + i] = {moments.mean[i], moments.squares[i]};
      }
      if (lane == 0) scratch.warp_rows[warp] = moments.rows;
    }
    __syncthreads();
    if (thread < channels && first + thread < args.C) {
      const double pivot = scratch.warp[0][thread].x;
      Sums sums = {};
      for (int i = 0; i < kWarps; ++i) add(sums, scratch.warp[i][thread], scratch.warp_rows[i], pivot);
      params.partial[static_cast<int64_t>(part.share) * args.C + first + thread] =
          moments_of(sums, rows_of(plan, part.share), pivot);
    }
    if (round + 1 < plan.rounds) prefetch<2 * kBatch<T, ALIGNED>>(x, Part(plan, args.M, args.C, round + 1));
    cooperative_groups::this_grid().sync();

    const int c = first + thread % channels;
    Sums sums = {};
    double pivot = 0;
    if (c < args.C) {
      pivot = __ldcg(params.partial + c).x;
#pragma unroll 4
      for (int share = thread / channels; share < plan.shares; share += kThreads / channels) {
        const float2 moments = __ldcg(params.partial + static_cast<int64_t>(share) * args.C + c);
        add(sums, moments, rows_of(plan, share), pivot);
      }
    }
    sums = total_of(sums, scratch, channels);
    if (thread < channels && c < args.C) {
      const float2 total = moments_of(sums, args.M, pivot);
      const float var = static_cast<float>(total.y / static_cast<double>(args.M));
      scratch.constant[0][thread] = total.x;
      scratch.constant[1][thread] = (args.weight == nullptr ? 1.0f : args.weight[c]) * rstd_of(var, args.eps);
      scratch.constant[2][thread] = args.bias == nullptr ? 0.0f : args.bias[c];
      if (part.share == 0) {
        args.mean[c] = total.x;
        args.var[c] = var;
      }
    }
    __syncthreads();

    float mean[kOctet], scale[kOctet], bias[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const int at = thread % plan.lanes * kOctet + i;
      mean[i] = scratch.constant[0][at];
      scale[i] = scratch.constant[1][at];
      bias[i] = scratch.constant[2][at];
    }
    write_tiles<ALIGNED, false, T>(args, mean, scale, bias, part, kept, room, part.tiles);
    write_tiles<ALIGNED, true, T>(args, mean, scale, bias, part, kept, 0, room);
  }
}

template <typename T>
auto kernel_for(const BatchNormFwd& args) {
  const bool aligned = args.C % kOctet == 0 && is_aligned(args.x) && is_aligned(args.residual) && is_aligned(args.y);
  return aligned ? batch_norm_fwd_kernel<T, true> : batch_norm_fwd_kernel<T, false>;
}

}  // namespace

cudaError_t plan_batch_norm_fwd(const BatchNormFwd& args, Dtype dtype, BatchNormPlan& plan) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    return plan_batch_norm<T>(kernel_for<T>(args), args.M, args.C, 1, plan);
  });
}

cudaError_t batch_norm_fwd(const BatchNormFwd& args, const BatchNormPlan& plan, float* partial, Dtype dtype,
                           cudaStream_t stream) {
  const FwdParams params = {args, plan, reinterpret_cast<float2*>(partial)};
  return with_storage(dtype, [&](auto zero) {
    return launch(kernel_for<decltype(zero)>(args), int64_t{plan.groups} * plan.shares, kThreads, plan.shared_bytes,
                  true, stream, params);
  });
}

}  // namespace fastarch
