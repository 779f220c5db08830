// gru, forward, after the reset-after unit of PyTorch and cuDNN:
//
//   r_t = sigmoid(p_r + W_hr h_{t-1} + b_hr),  z_t likewise,  n_t = tanh(p_n + r_t * (W_hn h_{t-1} + b_hn))
//   h_t = (1 - z_t) n_t + z_t h_{t-1}
//
// p = projected [T, N, 3H], h [N, H], w_hh [3H, H], gates [T, N, 4, H].
//
// One kernel walks all steps. A block has the rows of r, z and n of its units, so that a thread finds all three sums of
// its unit and computes the new state on the spot; only that state, [N, H], goes through L2 to the other blocks.
#include "cuda/gru.cuh"

namespace fastarch {
namespace {

struct FwdParams {
  GruFwd args;
  GruPlan plan;
  GruMemory memory;
};

// A block's weights: row (tile * 3 + gate) * 16 + unit. What no weight is written to stays 0.
template <typename T, bool TENSOR>
__device__ __forceinline__ void load_weights(T* weights, const GruWalk& walk, const GruPlan& plan) {
  const T* const w = static_cast<const T*>(walk.w_hh);
  const int first = blockIdx.x % plan.unit_slices * plan.tiles * kUnits;
  for (int row = threadIdx.x / kWarp; row < plan.tiles * kGates * kUnits; row += kWarps) {
    const int gate = row / kUnits % kGates, unit = first + row / (kGates * kUnits) * kUnits + row % kUnits;
    if (unit >= walk.H) continue;
    const T* const from = w + (int64_t{gate} * walk.H + unit) * walk.H;
    for (int begin = threadIdx.x % kWarp; begin < walk.H; begin += kWarp * kBatch) {
      T batch[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i * kWarp < walk.H) batch[i] = from[begin + i * kWarp];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int k = begin + i * kWarp;
        if (k < walk.H) weights[place<T, TENSOR, kGates>(row, k, plan.chunks)] = operand<T, TENSOR>(widen(batch[i]));
      }
    }
  }
}

// What a thread reads for its unit at a step, besides the product.
struct Inputs {
  float r, z, n, bias_n, h;  // r, z with both biases, n with the input's
  bool live;
};

template <typename T>
__device__ __forceinline__ Inputs read(const FwdParams& params, const Place& place, int64_t t) {
  const GruWalk& walk = params.args.walk;
  Inputs in = {};
  if (!place.exists) return in;
  in.h = params.memory.state[place.offset(walk)];
  in.live = t < length_of(walk, place.n);
  if (!in.live) return in;
  const T* const p = static_cast<const T*>(params.args.projected) + (t * walk.N + place.n) * kGates * walk.H;
  const T* const bias = static_cast<const T*>(params.args.b_hh);
  float b[kGates] = {};
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {
    if (bias != nullptr) b[gate] = widen(bias[gate * int64_t{walk.H} + place.unit]);
  }
  in.r = widen(p[place.unit]) + b[0];
  in.z = widen(p[walk.H + place.unit]) + b[1];
  in.n = widen(p[2 * int64_t{walk.H} + place.unit]);
  in.bias_n = b[2];
  return in;
}

struct Unit {
  float r, z, n, a, h;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ Unit step_of(const Inputs& in, const float (&sum)[kGates]) {
  Unit unit = {};
  unit.r = sigmoid(in.r + sum[0]);
  unit.z = sigmoid(in.z + sum[1]);
  unit.a = sum[2] + in.bias_n;
  unit.n = tanhf(fmaf(unit.r, unit.a, in.n));
  unit.h = fmaf(unit.z, in.h - unit.n, unit.n);
  return unit;
}

// Nobody on the device waits for these.
template <typename T>
__device__ __forceinline__ void write(const GruFwd& args, const Place& place, int64_t t, const Unit& unit, bool live) {
  const int64_t H = args.walk.H, row = t * args.walk.N + place.n;
  static_cast<T*>(args.output)[row * H + place.unit] = narrow<T>(live ? unit.h : 0.0f);
  if (args.gates == nullptr || !live) return;
  T* const gates = static_cast<T*>(args.gates) + row * 4 * H + place.unit;
  gates[0] = narrow<T>(unit.r);
  gates[H] = narrow<T>(unit.z);
  gates[2 * H] = narrow<T>(unit.n);
  gates[3 * H] = narrow<T>(unit.a);
}

template <typename T, bool TENSOR, int COLUMNS>
__global__ void __launch_bounds__(kThreads, 1) gru_fwd_kernel(const __grid_constant__ FwdParams params) {
  const GruWalk& walk = params.args.walk;
  const GruPlan& plan = params.plan;
  const int quads = plan.tiles * kGates * plan.chunks * 2 * kWarp;  // of the weights, 16 bytes each
  const int passes = plan.tiles * plan.rows / (kColumns * COLUMNS), pitch = plan.chunks * kChunk<T>;
  uint4* const weights = dynamic_shared<uint4>();
  float* const scratch = reinterpret_cast<float*>(weights + quads);
  T* const exchange = static_cast<T*>(params.memory.exchange);
  Meeting meeting = meeting_of(plan, params.memory.counters);
  const auto place_of = [&](int pass) { return Place::of<COLUMNS>(plan, walk, pass); };
  const auto step_at = [&](int64_t step) { return walk.reverse ? walk.T - 1 - step : step; };
  const auto keep = [&](const Place& place, float h, int half) {
    params.memory.state[place.offset(walk)] = h;
    exchange[half * half_of<T>(plan) + int64_t{place.n} * pitch + place.unit] = operand<T, TENSOR>(h);
  };

  for (int pass = 0; pass < passes; ++pass) {
    const Place place = place_of(pass);
    if (place.exists) keep(place, widen(static_cast<const T*>(walk.h0)[place.offset(walk)]), 0);
  }
  __syncthreads();
  meeting.arrive();
  Inputs in = read<T>(params, place_of(0), step_at(0));
  for (int i = threadIdx.x; i < quads; i += kThreads) weights[i] = uint4{};
  __syncthreads();
  load_weights<T, TENSOR>(reinterpret_cast<T*>(weights), walk, plan);
  meeting.wait();

  for (int64_t step = 0; step < walk.T; ++step) {
    const int half = static_cast<int>(step % 2);
    const int64_t t = step_at(step);
    for (int pass = 0; pass < passes; ++pass) {
      const Place place = place_of(pass);
      const int first = blockIdx.x / plan.unit_slices * plan.rows + pass / plan.tiles * kColumns * COLUMNS;
      float sum[kGates];
      total<T, TENSOR, kGates, COLUMNS>(sum, weights + pass % plan.tiles * kGates * plan.chunks * 2 * kWarp,
                                        exchange + half * half_of<T>(plan) + int64_t{first} * pitch, plan.chunks,
                                        scratch);
      Unit unit = {};
      if (in.live) unit = step_of(in, sum);
      if (place.exists) keep(place, in.live ? unit.h : in.h, 1 - half);
      __syncthreads();
      const bool last = pass + 1 == passes;
      if (last) meeting.arrive();
      if (place.exists) write<T>(params.args, place, t, unit, in.live);
      if (!last) in = read<T>(params, place_of(pass + 1), t);
    }
    if (step + 1 == walk.T) break;
    in = read<T>(params, place_of(0), step_at(step + 1));
    meeting.wait();
  }

  for (int pass = 0; pass < passes; ++pass) {
    const Place place = place_of(pass);
    if (!place.exists) continue;
    const int64_t at = place.offset(walk);
    static_cast<T*>(params.args.h_n)[at] = narrow<T>(params.memory.state[at]);
  }
}

}  // namespace

cudaError_t plan_gru_fwd(const GruWalk& walk, Dtype dtype, GruPlan& plan) {
  return with_arithmetic(dtype, walk.tf32, [&](auto zero, auto) {
    using T = decltype(zero);
    return plan_gru(walk, padded<T>(walk.H) / kChunk<T>, kGates, plan);
  });
}

cudaError_t gru_fwd(const GruFwd& args, const GruPlan& plan, const GruMemory& memory, Dtype dtype,
                    cudaStream_t stream) {
  const FwdParams params = {args, plan, memory};
  return with_arithmetic(dtype, args.walk.tf32, [&](auto zero, auto tensor) {
    using T = decltype(zero);
    const auto kernel = plan.columns == 2 ? gru_fwd_kernel<T, tensor.value, 2> : gru_fwd_kernel<T, tensor.value, 1>;
    return launch(kernel, int64_t{plan.unit_slices} * plan.batch_slices, kThreads, plan.shared_bytes, true, stream,
                  params);
  });
}

}  // namespace fastarch
