// fastarch::gru_persistent_fwd and _bwd on CUDA. Schemas, semantics and friendly errors: ops/gru.py.
// What is checked here keeps a direct call of the operations from reading or writing out of bounds.
//
// The kernels walk the steps. What needs no walk, the input's share of the gates and the sums over all steps in the
// backward, are large products, which the library does as well as can be.
#include "cuda/gru.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "cuda/dtype.h"

namespace fastarch {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMost = 1 << 24;  // sequences and units: numbers of them and of chunks are 32 bits wide
constexpr int64_t kMostMeetings = int64_t{1} << 32;  // blocks times steps: so are the counters of the barrier

void check(const char* name, const char* what, const OptionalTensor& t, at::IntArrayRef sizes, const Tensor& input) {
  TORCH_CHECK_VALUE(!t || t->sizes() == sizes, name, ": want ", what, " ", sizes);
  TORCH_CHECK_TYPE(!t || (t->scalar_type() == input.scalar_type() && t->device() == input.device()), name, ": want ",
                   what, " of ", input.scalar_type(), " on ", input.device());
}

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// Tensors that a walk reads, kept alive, and the walk over them.
struct Inputs {
  Tensor h0, w_hh;
  OptionalTensor lengths;
  GruWalk walk;
};

Inputs inputs(const char* name, const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
              const OptionalTensor& lengths, bool reverse, bool reset_after, bool tf32) {
  TORCH_CHECK_VALUE(reset_after, name, ": want reset_after");
  TORCH_CHECK_VALUE(input.dim() == 3 && input.numel() > 0, name, ": want input [T, N, C], not empty, got ",
                    input.sizes());
  TORCH_CHECK_VALUE(h0.dim() == 2 && h0.size(1) > 0, name, ": want h0 [N, H], got ", h0.sizes());
  const int64_t N = input.size(1), C = input.size(2), H = h0.size(1);
  TORCH_CHECK_VALUE(N < kMost && H < kMost, name, ": want less than ", kMost, " sequences and units, got ", h0.sizes());
  check(name, "h0", h0, {N, H}, input);
  check(name, "w_ih", w_ih, {3 * H, C}, input), check(name, "w_hh", w_hh, {3 * H, H}, input);
  TORCH_CHECK_VALUE(!lengths || lengths->sizes() == at::IntArrayRef{N}, name, ": want lengths [", N, "]");
  TORCH_CHECK_TYPE(!lengths || (lengths->scalar_type() == at::kLong && lengths->device() == input.device()), name,
                   ": want lengths of Long on ", input.device());
  Inputs in{h0.contiguous(), w_hh.contiguous(), contiguous(lengths), {}};
  in.walk = {
      input.size(0), static_cast<int>(N),    static_cast<int>(H),      reverse,
      tf32,          in.h0.const_data_ptr(), in.w_hh.const_data_ptr(), static_cast<const int64_t*>(data(in.lengths))};
  return in;
}

// What a launch works in, by its plan.
struct Memory {
  Tensor exchange, counters, state;

  Memory(const char* name, const GruPlan& plan, const Tensor& h0, int64_t T) {
    TORCH_CHECK_VALUE(plan.unit_slices > 0, name, ": the recurrent weights of H = ", h0.size(1), " in ",
                      h0.scalar_type(), " do not fit into the shared memory of this device");
    TORCH_CHECK_VALUE(T < kMostMeetings / plan.unit_slices, name, ": want less than ", kMostMeetings / plan.unit_slices,
                      " steps, got ", T);
    exchange = at::zeros({plan.exchange_bytes}, h0.options().dtype(at::kByte));
    counters = at::zeros({plan.counter_bytes}, h0.options().dtype(at::kByte));
    state = at::empty(h0.sizes(), h0.options().dtype(at::kFloat));
  }
  GruMemory pointers() const {
    return {exchange.mutable_data_ptr(), static_cast<unsigned*>(counters.mutable_data_ptr()),
            state.mutable_data_ptr<float>()};
  }
};

std::tuple<Tensor, Tensor, Tensor> gru_persistent_fwd(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                                                      const Tensor& w_hh, const OptionalTensor& b_ih,
                                                      const OptionalTensor& b_hh, const OptionalTensor& lengths,
                                                      bool reverse, bool reset_after, bool save_gates, bool tf32) {
  constexpr const char* name = "gru_persistent_fwd";
  const at::AutoDispatchBelowADInplaceOrView guard_autograd;
  const Dtype dtype = dtype_of(name, input);
  const Inputs in = inputs(name, input, h0, w_ih, w_hh, lengths, reverse, reset_after, tf32);
  const int64_t T = in.walk.T, N = in.walk.N, H = in.walk.H;
  check(name, "b_ih", b_ih, {3 * H}, input), check(name, "b_hh", b_hh, {3 * H}, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const OptionalTensor b = contiguous(b_hh);

  GruPlan plan;
  C10_CUDA_CHECK(plan_gru_fwd(in.walk, dtype, plan));
  const Memory memory(name, plan, in.h0, T);
  const Tensor projected = at::linear(input, w_ih, b_ih).contiguous();
  const Tensor output = at::empty({T, N, H}, input.options()), h_n = at::empty({N, H}, input.options());
  const Tensor gates = save_gates ? at::empty({T, N, 4, H}, input.options()) : at::empty({0}, input.options());
  const GruFwd args{in.walk,
                    projected.const_data_ptr(),
                    data(b),
                    output.mutable_data_ptr(),
                    h_n.mutable_data_ptr(),
                    save_gates ? gates.mutable_data_ptr() : nullptr};
  C10_CUDA_CHECK(gru_fwd(args, plan, memory.pointers(), dtype, c10::cuda::getCurrentCUDAStream()));
  return {output, h_n, gates};
}

// Whether (t, n) is padding, [T, N, 1], of sequences that end `early` steps sooner.
Tensor padding(const Tensor& lengths, int64_t T, int64_t early) {
  return at::arange(early, T + early, lengths.options()).unsqueeze(1).ge(lengths).unsqueeze(2);
}

// h_{t-1} of every step, [T, N, H].
Tensor states_before(const Inputs& in, const Tensor& output) {
  const int64_t T = in.walk.T;
  const Tensor first = in.h0.unsqueeze(0);
  if (!in.walk.reverse) return at::cat({first, output.narrow(0, 0, T - 1)});
  const Tensor before = at::cat({output.narrow(0, 1, T - 1), first});
  return in.lengths ? at::where(padding(*in.lengths, T, 1), first, before) : before;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_persistent_bwd(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input, const Tensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& output, const Tensor& gates, const OptionalTensor& lengths,
    bool reverse, bool reset_after, bool tf32, std::array<bool, 6> wanted) {
  constexpr const char* name = "gru_persistent_bwd";
  const at::AutoDispatchBelowADInplaceOrView guard_autograd;
  const Dtype dtype = dtype_of(name, input);
  const Inputs in = inputs(name, input, h0, w_ih, w_hh, lengths, reverse, reset_after, tf32);
  const int64_t T = in.walk.T, N = in.walk.N, H = in.walk.H;
  check(name, "grad_output", grad_output, {T, N, H}, input), check(name, "grad_h_n", grad_h_n, {N, H}, input);
  check(name, "output", output, {T, N, H}, input), check(name, "gates", gates, {T, N, 4, H}, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const OptionalTensor dy = contiguous(grad_output), dh_n = contiguous(grad_h_n);
  const Tensor y = output.contiguous(), saved = gates.contiguous();

  GruPlan plan;
  C10_CUDA_CHECK(plan_gru_bwd(in.walk, dtype, plan));
  const Memory memory(name, plan, in.h0, T);
  const auto [want_input, want_h0, want_w_ih, want_w_hh, want_b_ih, want_b_hh] = wanted;
  const bool want_da = want_input || want_w_ih || want_w_hh || want_b_ih || want_b_hh;
  const auto none = [&] { return at::empty({0}, input.options()); };
  const Tensor da = want_da ? at::empty({T, N, 4, H}, input.options()) : none();
  const Tensor grad_h0 = want_h0 ? at::empty({N, H}, input.options()) : none();
  const GruBwd args{in.walk,
                    data(dy),
                    data(dh_n),
                    y.const_data_ptr(),
                    saved.const_data_ptr(),
                    want_da ? da.mutable_data_ptr() : nullptr,
                    want_h0 ? grad_h0.mutable_data_ptr() : nullptr};
  C10_CUDA_CHECK(gru_bwd(args, plan, memory.pointers(), dtype, c10::cuda::getCurrentCUDAStream()));

  Tensor grad_input = none(), grad_w_ih = none(), grad_w_hh = none(), grad_b_ih = none(), grad_b_hh = none();
  if (!want_da) return {grad_input, grad_h0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh};
  const Tensor flat = da.view({T * N, 4 * H});  // dr, dz, dn, dn * r
  const Tensor at_input = flat.narrow(1, 0, 3 * H), of_rz = flat.narrow(1, 0, 2 * H);
  if (want_input) grad_input = at::mm(at_input, w_ih).view(input.sizes());
  if (want_w_ih) {  // what stands in padding, NaN included, must not meet its gradients of 0
    const Tensor x = in.lengths ? input.masked_fill(padding(*in.lengths, T, 0), 0) : input;
    grad_w_ih = at::mm(at_input.t(), x.reshape({T * N, input.size(2)}));
  }
  if (want_w_hh) {
    const Tensor h = states_before(in, y).view({T * N, H});
    grad_w_hh = at::cat({at::mm(of_rz.t(), h), at::mm(flat.narrow(1, 3 * H, H).t(), h)});
  }
  if (want_b_ih || want_b_hh) {
    const Tensor sums = flat.sum(0, false, at::kFloat).to(input.scalar_type());
    if (want_b_ih) grad_b_ih = sums.narrow(0, 0, 3 * H).clone();
    if (want_b_hh) grad_b_hh = at::cat({sums.narrow(0, 0, 2 * H), sums.narrow(0, 3 * H, H)});
  }
  return {grad_input, grad_h0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CUDA, m) {
  m.impl("gru_persistent_fwd", &gru_persistent_fwd);
  m.impl("gru_persistent_bwd", &gru_persistent_bwd);
}

}  // namespace fastarch
