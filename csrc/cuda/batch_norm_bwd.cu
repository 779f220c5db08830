// batch_norm, backward, with the batch's own statistics. With rstd = 1 / sqrt(var + eps) and xhat = (x - mean) rstd:
//
//   dz[m, c]   = dy[m, c] where z[m, c] passed ReLU, else 0
//   dbias[c]   = sum_m dz[m, c],   dweight[c] = sum_m dz[m, c] xhat[m, c]
//   dx[m, c]   = weight[c] rstd[c] (dz[m, c] - dbias[c] / M - xhat[m, c] dweight[c] / M)
//
// x, dy, dz, dx [M, C]; dz is also the residual's gradient. What passed is in the mask or, where there was no residual,
// computed again from x with the forward's own expression.
//
// One kernel, as the forward: it keeps x and dz of the rows that it has summed, and finishes them from there.
#include "cuda/batch_norm.cuh"

namespace fastarch {
namespace {

enum class Gate { none, mask, recompute };

struct BwdParams {
  BatchNormBwd args;
  BatchNormPlan plan;
  Gate gate;
  float2* partial;  // [shares, C]: sums of dz and of dz (x - mean)
};

// Of a thread's channels.
struct Constants {
  float mean[kOctet], scale[kOctet], bias[kOctet];
};

// Turns a batch of dy into dz. `tile_of` names the tile of each.
template <typename T, int BATCH, typename F>
__device__ __forceinline__ void gate(Octet<T> (&dz)[BATCH], const Octet<T> (&x)[BATCH], const BwdParams& params,
                                     const Constants& constants, const Part& part, F tile_of) {
  if (params.gate == Gate::none) return;
  unsigned passed[BATCH];
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    if (params.gate == Gate::mask) {
      passed[i] = params.args.mask[part.octet + tile_of(i) * part.mask_pitch];
    } else {
      passed[i] = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float z = normalised(widen(x[i].v[j]), constants.mean[j], constants.scale[j], constants.bias[j]);
        passed[i] |= static_cast<unsigned>(passes(z)) << j;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (!(passed[i] >> j & 1)) dz[i].v[j] = T{};
    }
  }
}

// First phase, tiles [begin, end); a batch that is not full repeats the last tile. Writes dz and adds up dz and dz (x -
// mean).
template <bool ALIGNED, bool KEEP, typename T>
__device__ __forceinline__ void read_tiles(float (&sum)[kOctet], float (&product)[kOctet], const BwdParams& params,
                                           const Constants& constants, const Part& part, uint4* kept, int begin,
                                           int end) {
  constexpr int BATCH = kBatch<T, ALIGNED>;
  const T *x = static_cast<const T*>(params.args.x), *dy = static_cast<const T*>(params.args.dy);
  T* const dz = static_cast<T*>(params.args.dz);
  for (int tile = begin; tile < end; tile += BATCH) {
    const auto tile_of = [&](int i) { return min(tile + i, end - 1); };
    Octet<T> x_batch[BATCH], dz_batch[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int64_t from = part.offset + tile_of(i) * part.pitch;
      x_batch[i] = load<ALIGNED, KEEP>(x + from, part.live);
      dz_batch[i] = load<ALIGNED, KEEP>(dy + from, part.live);
    }
    gate(dz_batch, x_batch, params, constants, part, tile_of);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (KEEP) {
        keep(kept, 2 * tile_of(i), x_batch[i]);
        keep(kept, 2 * tile_of(i) + 1, dz_batch[i]);
      }
      if (dz != nullptr) store<ALIGNED>(dz + part.offset + tile_of(i) * part.pitch, dz_batch[i], part.live);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float value = tile + i < end ? widen(dz_batch[i].v[j]) : 0.0f;
        sum[j] += value;
        product[j] = fmaf(value, widen(x_batch[i].v[j]) - constants.mean[j], product[j]);
      }
    }
  }
}

// Second phase, tiles [begin, end), the last first: dx = scale dz + slope (x - mean) + shift.
template <bool ALIGNED, bool KEPT, typename T>
__device__ __forceinline__ void write_tiles(const BwdParams& params, const Constants& constants,
                                            const float (&slope)[kOctet], const float (&shift)[kOctet],
                                            const Part& part, const uint4* kept, int begin, int end) {
  constexpr int BATCH = kBatch<T, ALIGNED>;
  const T *x = static_cast<const T*>(params.args.x), *dy = static_cast<const T*>(params.args.dy);
  T* const dx = static_cast<T*>(params.args.dx);
  for (int tile = end - 1; tile >= begin; tile -= BATCH) {
    const auto tile_of = [&](int i) { return max(tile - i, begin); };
    Octet<T> x_batch[BATCH], dz_batch[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int64_t from = part.offset + tile_of(i) * part.pitch;
      x_batch[i] = KEPT ? recall<T>(kept, 2 * tile_of(i)) : load<ALIGNED, true>(x + from, part.live);
      dz_batch[i] = KEPT ? recall<T>(kept, 2 * tile_of(i) + 1) : load<ALIGNED, true>(dy + from, part.live);
    }
    if (!KEPT) gate(dz_batch, x_batch, params, constants, part, tile_of);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float centred = widen(x_batch[i].v[j]) - constants.mean[j];
        const float value = fmaf(constants.scale[j], widen(dz_batch[i].v[j]), fmaf(slope[j], centred, shift[j]));
        x_batch[i].v[j] = narrow<T>(value);
      }
      store<ALIGNED>(dx + part.offset + tile_of(i) * part.pitch, x_batch[i], part.live);
    }
  }
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, 1) batch_norm_bwd_kernel(const __grid_constant__ BwdParams params) {
  const BatchNormBwd& args = params.args;
  const BatchNormPlan& plan = params.plan;
  Scratch& scratch = *dynamic_shared<Scratch>();
  uint4* const kept = reinterpret_cast<uint4*>(&scratch + 1);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int channels = plan.lanes * kOctet;

  for (int round = 0; round < plan.rounds; ++round) {
    const Part part(plan, args.M, args.C, round);
    const int first = part.channel - thread % plan.lanes * kOctet;  // channel of the slice
    const int room = min(plan.kept, part.tiles);
    Constants constants = {};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i >= part.live) break;
      const int c = part.channel + i;
      constants.mean[i] = args.mean[c];
      constants.scale[i] = (args.weight == nullptr ? 1.0f : args.weight[c]) * rstd_of(args.var[c], args.eps);
      constants.bias[i] = args.bias == nullptr ? 0.0f : args.bias[c];
    }

    float sum[kOctet] = {}, product[kOctet] = {};
    read_tiles<ALIGNED, true, T>(sum, product, params, constants, part, kept, 0, room);
    read_tiles<ALIGNED, false, T>(sum, product, params, constants, part, kept, room, part.tiles);
    for (int bits = plan.lanes; bits < kWarp; bits *= 2) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], bits);
        product[i] += __shfl_xor_sync(~0u, product[i], bits);
      }
    }
    if (lane < plan.lanes) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) scratch.warp[warp][lane * kOctet + i] = {sum[i], product[i]};
    }
    __syncthreads();
    if (thread < channels && first + thread < args.C) {
      Sums sums = {};
      for (int i = 0; i < kWarps; ++i) {
        sums.a += scratch.warp[i][thread].x;
        sums.b += scratch.warp[i][thread].y;
      }
      params.partial[static_cast<int64_t>(part.share) * args.C + first + thread] = {static_cast<float>(sums.a),
                                                                                    static_cast<float>(sums.b)};
    }
    if (round + 1 < plan.rounds) {
      const Part next(plan, args.M, args.C, round + 1);
      prefetch<kBatch<T, ALIGNED>>(static_cast<const T*>(args.x), next);
      prefetch<kBatch<T, ALIGNED>>(static_cast<const T*>(args.dy), next);
    }
    cooperative_groups::this_grid().sync();

    const int c = first + thread % channels;
    Sums sums = {};
    if (c < args.C) {
#pragma unroll 4
      for (int share = thread / channels; share < plan.shares; share += kThreads / channels) {
        const float2 part_sums = __ldcg(params.partial + static_cast<int64_t>(share) * args.C + c);
        sums.a += part_sums.x;
        sums.b += part_sums.y;
      }
    }
    sums = total_of(sums, scratch, channels);
    if (thread < channels && c < args.C) {
      const float rstd = rstd_of(args.var[c], args.eps);
      const double weight = args.weight == nullptr ? 1.0f : args.weight[c];
      const double dweight = sums.b * rstd, rows = args.M;
      scratch.constant[0][thread] = static_cast<float>(-weight * rstd * rstd * dweight / rows);
      scratch.constant[1][thread] = static_cast<float>(-weight * rstd * sums.a / rows);
      if (part.share == 0) {
        if (args.dweight != nullptr) args.dweight[c] = static_cast<float>(dweight);
        if (args.dbias != nullptr) args.dbias[c] = static_cast<float>(sums.a);
      }
    }
    __syncthreads();
    if (args.dx == nullptr) continue;

    float slope[kOctet], shift[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      slope[i] = scratch.constant[0][thread % plan.lanes * kOctet + i];
      shift[i] = scratch.constant[1][thread % plan.lanes * kOctet + i];
    }
    write_tiles<ALIGNED, false, T>(params, constants, slope, shift, part, kept, room, part.tiles);
    write_tiles<ALIGNED, true, T>(params, constants, slope, shift, part, kept, 0, room);
  }
}

template <typename T>
auto kernel_for(const BatchNormBwd& args) {
  const bool aligned =
      args.C % kOctet == 0 && is_aligned(args.x) && is_aligned(args.dy) && is_aligned(args.dx) && is_aligned(args.dz);
  return aligned ? batch_norm_bwd_kernel<T, true> : batch_norm_bwd_kernel<T, false>;
}

}  // namespace

cudaError_t plan_batch_norm_bwd(const BatchNormBwd& args, Dtype dtype, BatchNormPlan& plan) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    return plan_batch_norm<T>(kernel_for<T>(args), args.M, args.C, args.dx == nullptr ? 0 : 2, plan);
  });
}

cudaError_t batch_norm_bwd(const BatchNormBwd& args, const BatchNormPlan& plan, float* partial, Dtype dtype,
                           cudaStream_t stream) {
  const Gate gate = !args.relu ? Gate::none : args.mask != nullptr ? Gate::mask : Gate::recompute;
  const BwdParams params = {args, plan, gate, reinterpret_cast<float2*>(partial)};
  return with_storage(dtype, [&](auto zero) {
    return launch(kernel_for<decltype(zero)>(args), int64_t{plan.groups} * plan.shares, kThreads, plan.shared_bytes,
                  true, stream, params);
  });
}

}  // namespace fastarch
