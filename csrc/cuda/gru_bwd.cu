// gru, backward, of the reset-after unit: the walk from the last step back to the first, dh the gradient of h_t.
//
//   dz = dh (h_{t-1} - n) z (1 - z),  dn = dh (1 - z) (1 - n^2),  dr = dn a_n r (1 - r)
//   dh_{t-1} = dh z + W_hr' dr + W_hz' dz + W_hn' (dn r)
//
// h [N, H], w_hh [3H, H], gates and da [T, N, 4, H]. Gradients of weights, biases and the input are products over all
// steps, made from da when the walk has ended.
//
// The mirror image of the forward: a block has the columns of W_hh of its units, 3H long; dr, dz and dn r of a step,
// [N, 3, H], go through L2 to the other blocks.
#include "cuda/gru.cuh"

namespace fastarch {
namespace {

struct BwdParams {
  GruBwd args;
  GruPlan plan;
  GruMemory memory;
};

// A block's weights: row tile * 16 + unit, k = gate * padded(H) + i for row gate * H + i of w_hh. The rest stays 0.
template <typename T, bool TENSOR>
__device__ __forceinline__ void load_weights(T* weights, const GruWalk& walk, const GruPlan& plan) {
  const T* const w = static_cast<const T*>(walk.w_hh);
  constexpr int kStep = kThreads / kUnits;
  const int rows = kGates * walk.H, first = blockIdx.x % plan.unit_slices * plan.tiles * kUnits;
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const int row = tile * kUnits + threadIdx.x % kUnits, unit = first + row;
    if (unit >= walk.H) continue;
    for (int begin = threadIdx.x / kUnits; begin < rows; begin += kStep * kBatch) {
      T batch[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i * kStep < rows) batch[i] = w[int64_t{begin + i * kStep} * walk.H + unit];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int from = begin + i * kStep, k = from / walk.H * padded<T>(walk.H) + from % walk.H;
        if (from < rows) weights[place<T, TENSOR, 1>(row, k, plan.chunks)] = operand<T, TENSOR>(widen(batch[i]));
      }
    }
  }
}

// What a thread reads for its unit at a step, besides the product.
struct Inputs {
  float r, z, n, a, h, dy;  // h: before the step
  bool live;
};

template <typename T>
__device__ __forceinline__ Inputs read(const BwdParams& params, const Place& place, int64_t t) {
  const GruWalk& walk = params.args.walk;
  const int64_t H = walk.H, length = place.exists ? length_of(walk, place.n) : 0;
  Inputs in = {};
  in.live = t < length;
  if (!in.live) return in;
  const int64_t row = t * walk.N + place.n, before = walk.reverse ? t + 1 : t - 1;
  const T* const gates = static_cast<const T*>(params.args.gates) + row * 4 * H + place.unit;
  in.r = widen(gates[0]);
  in.z = widen(gates[H]);
  in.n = widen(gates[2 * H]);
  in.a = widen(gates[3 * H]);
  in.h = before < 0 || before >= length
             ? widen(static_cast<const T*>(walk.h0)[place.offset(walk)])
             : widen(static_cast<const T*>(params.args.output)[(before * walk.N + place.n) * H + place.unit]);
  if (params.args.dy != nullptr) in.dy = widen(static_cast<const T*>(params.args.dy)[row * H + place.unit]);
  return in;
}

struct Gradients {
  float r, z, n, n_r, h;  // n_r: of a_n, which is n times r; h: what passes to the step before without the product
};

__device__ __forceinline__ Gradients step_of(const Inputs& in, float carried) {
  const float dh = carried + in.dy;
  Gradients d = {};
  d.z = dh * (in.h - in.n) * in.z * (1 - in.z);
  d.n = dh * (1 - in.z) * (1 - in.n * in.n);
  d.n_r = d.n * in.r;
  d.r = d.n_r * in.a * (1 - in.r);
  d.h = dh * in.z;
  return d;
}

// Nobody on the device waits for these. Padding's are 0.
template <typename T>
__device__ __forceinline__ void write(const GruBwd& args, const Place& place, int64_t t, const Gradients& d) {
  const int64_t H = args.walk.H;
  T* const da = static_cast<T*>(args.da) + (t * args.walk.N + place.n) * 4 * H + place.unit;
  da[0] = narrow<T>(d.r);
  da[H] = narrow<T>(d.z);
  da[2 * H] = narrow<T>(d.n);
  da[3 * H] = narrow<T>(d.n_r);
}

template <typename T, bool TENSOR, int COLUMNS>
__global__ void __launch_bounds__(kThreads, 1) gru_bwd_kernel(const __grid_constant__ BwdParams params) {
  const GruWalk& walk = params.args.walk;
  const GruPlan& plan = params.plan;
  const int quads = plan.tiles * plan.chunks * 2 * kWarp;  // of the weights, 16 bytes each
  const int passes = plan.tiles * plan.rows / (kColumns * COLUMNS), pitch = plan.chunks * kChunk<T>;
  uint4* const weights = dynamic_shared<uint4>();
  float* const scratch = reinterpret_cast<float*>(weights + quads);
  T* const exchange = static_cast<T*>(params.memory.exchange);
  float* const carry = params.memory.state;
  const T* const dh_n = static_cast<const T*>(params.args.dh_n);
  Meeting meeting = meeting_of(plan, params.memory.counters);
  const auto place_of = [&](int pass) { return Place::of<COLUMNS>(plan, walk, pass); };
  const auto step_at = [&](int64_t step) { return walk.reverse ? step : walk.T - 1 - step; };
  const auto give = [&](const Place& place, const Gradients& d, int half) {
    const int64_t H = padded<T>(walk.H);
    T* const to = exchange + half * half_of<T>(plan) + int64_t{place.n} * pitch + place.unit;
    to[0] = operand<T, TENSOR>(d.r);
    to[H] = operand<T, TENSOR>(d.z);
    to[2 * H] = operand<T, TENSOR>(d.n_r);
  };

  for (int i = threadIdx.x; i < quads; i += kThreads) weights[i] = uint4{};
  __syncthreads();
  load_weights<T, TENSOR>(reinterpret_cast<T*>(weights), walk, plan);
  for (int pass = 0; pass < passes; ++pass) {
    const Place place = place_of(pass);
    if (!place.exists) continue;
    const int64_t at = place.offset(walk);
    carry[at] = dh_n == nullptr ? 0.0f : widen(dh_n[at]);
  }
  Inputs in = read<T>(params, place_of(0), step_at(0));
  __syncthreads();

  // A step first takes the product that the step after it left to it; beyond the last there is only that.
  for (int64_t step = 0; step <= walk.T; ++step) {
    const int half = static_cast<int>(step % 2);
    for (int pass = 0; pass < passes; ++pass) {
      const Place place = place_of(pass);
      const int first = blockIdx.x / plan.unit_slices * plan.rows + pass / plan.tiles * kColumns * COLUMNS;
      float sum[1] = {};
      if (step > 0) {
        total<T, TENSOR, 1, COLUMNS>(sum, weights + pass % plan.tiles * plan.chunks * 2 * kWarp,
                                     exchange + (1 - half) * half_of<T>(plan) + int64_t{first} * pitch, plan.chunks,
                                     scratch);
      }
      const float carried = place.exists ? carry[place.offset(walk)] + sum[0] : 0.0f;
      if (step == walk.T) {
        if (place.exists) static_cast<T*>(params.args.dh0)[place.offset(walk)] = narrow<T>(carried);
        __syncthreads();
        continue;
      }
      Gradients d = {};
      if (in.live) d = step_of(in, carried);
      if (place.exists) {
        carry[place.offset(walk)] = in.live ? d.h : carried;
        give(place, d, half);
      }
      __syncthreads();
      const bool last = pass + 1 == passes;
      if (last) meeting.arrive();
      if (place.exists && params.args.da != nullptr) write<T>(params.args, place, step_at(step), d);
      if (!last) in = read<T>(params, place_of(pass + 1), step_at(step));
    }
    if (step == walk.T || (step + 1 == walk.T && params.args.dh0 == nullptr)) break;
    if (step + 1 < walk.T) in = read<T>(params, place_of(0), step_at(step + 1));
    meeting.wait();
  }
}

}  // namespace

cudaError_t plan_gru_bwd(const GruWalk& walk, Dtype dtype, GruPlan& plan) {
  return with_arithmetic(dtype, walk.tf32, [&](auto zero, auto) {
    using T = decltype(zero);
    return plan_gru(walk, kGates * padded<T>(walk.H) / kChunk<T>, 1, plan);
  });
}

cudaError_t gru_bwd(const GruBwd& args, const GruPlan& plan, const GruMemory& memory, Dtype dtype,
                    cudaStream_t stream) {
  const BwdParams params = {args, plan, memory};
  return with_arithmetic(dtype, args.walk.tf32, [&](auto zero, auto tensor) {
    using T = decltype(zero);
    const auto kernel = plan.columns == 2 ? gru_bwd_kernel<T, tensor.value, 2> : gru_bwd_kernel<T, tensor.value, 1>;
    return launch(kernel, int64_t{plan.unit_slices} * plan.batch_slices, kThreads, plan.shared_bytes, true, stream,
                  params);
  });
}

}  // namespace fastarch
