// gru on CPUs, the torch side: checks, outputs, threads, registration.
#include "cpu/gru.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace fastarch {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// The public function in Python explains bad arguments; these checks keep a direct call of the operation in bounds.
void check(const char* what, const OptionalTensor& t, at::IntArrayRef sizes, const Tensor& input) {
  TORCH_CHECK_VALUE(!t || (t->sizes() == sizes && t->device() == input.device()), "gru: want ", what, " ", sizes,
                    " on ", input.device());
  TORCH_CHECK_TYPE(!t || t->scalar_type() == input.scalar_type(), "gru: input is ", input.scalar_type(), ", ", what,
                   " is not");
}

Gru problem(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
            const OptionalTensor& lengths, bool reverse, bool reset_after) {
  TORCH_CHECK_VALUE(input.dim() == 3 && input.numel() > 0, "gru: want input [T, N, C], not empty, got ", input.sizes());
  TORCH_CHECK_VALUE(h0.dim() == 2 && h0.size(1) > 0, "gru: want h0 [N, H], got ", h0.sizes());
  const Gru p{input.size(0), input.size(1), input.size(2), h0.size(1), reverse, reset_after, nullptr};
  check("h0", h0, {p.N, p.H}, input);
  check("w_ih", w_ih, {3 * p.H, p.C}, input), check("w_hh", w_hh, {3 * p.H, p.H}, input);
  TORCH_CHECK_VALUE(!lengths || (lengths->sizes() == at::IntArrayRef{p.N} && lengths->device() == input.device()),
                    "gru: want lengths [", p.N, "] on ", input.device());
  TORCH_CHECK_TYPE(!lengths || lengths->scalar_type() == at::kLong, "gru: want lengths of Long, got ",
                   lengths->scalar_type());
  return p;
}

void check_algorithm(std::string_view algorithm) {
  TORCH_CHECK_VALUE(algorithm == "sequence", "gru: want algorithm sequence on CPUs, got ", algorithm);
}

// Who shares the work: rows of the batch where each worker gets enough to use weights it has loaded; else hidden units,
// if a step is worth meeting for. `keeps_units`: where weights do not fit an L2 cache, a worker's own units' do, which
// every step reads again (forward, 32 rows of 512 units on a Xeon: 36.7 -> 32 ms; backward 4 % slower).
Team team_for(const Gru& p, bool keeps_units) {
  constexpr double WORTH_A_WORKER = IF_WORTH_IT * 2e6;      // operations: waking a core takes as long as some 1e6
  constexpr int64_t ROWS = 4, UNITS = 64;                   // of a worker
  constexpr double WORTH_A_MEETING = IF_WORTH_IT * 40'000;  // multiply-adds of a step, as long as one or two
  constexpr double L2_WEIGHTS = 400'000;                    // 1.6 MB of floats
  const double step = 3.0 * p.N * p.H * p.H, all = 2.0 * p.T * (step + 3.0 * p.N * p.H * p.C);
  const auto at_most = [&](double workers) { return std::max<int64_t>(1, std::min<double>(threads(), workers)); };
  const int64_t by_rows = std::min(at_most(double(p.N) / ROWS), at_most(all / WORTH_A_WORKER));
  const int64_t by_units =
      step < WORTH_A_MEETING ? 1 : std::min(at_most(double(p.H) / UNITS), at_most(all / WORTH_A_WORKER));
  const bool once = p.T == 1 && (p.N < 16 || by_rows == by_units);  // a weight is used once, whoever shares the work
  const bool keeps = keeps_units && 3.0 * p.H * p.H > L2_WEIGHTS && by_rows == by_units;
  if (!once && !keeps && by_rows >= by_units) return {0, by_rows, by_rows, Split::ROWS, nullptr};
  return {0, by_units, by_units, Split::UNITS, nullptr};
}

template <class Kernel, class Arguments>
void run(const Kernel& kernel, const Gru& p, const Arguments& arguments, bool keeps_units) {
  const Team team = team_for(p, keeps_units);
  const Tensor memory = workspace(kernel.memory_bytes(p, team));
  Meeting meeting{};
  region(team.size, [&](int64_t begin, int64_t end) {
    kernel.run(p, arguments, Team{begin, end, team.size, team.split, &meeting}, memory.data_ptr());
  });
}

std::tuple<Tensor, Tensor, Tensor> gru_fwd(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                                           const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                           const OptionalTensor& lengths, bool reverse, bool reset_after,
                                           bool save_gates, std::string_view algorithm) {
  Gru p = problem(input, h0, w_ih, w_hh, lengths, reverse, reset_after);
  check_algorithm(algorithm);
  check("b_ih", b_ih, {3 * p.H}, input), check("b_hh", b_hh, {3 * p.H}, input);
  const Tensor x = input.contiguous(), h = h0.contiguous(), wi = w_ih.contiguous(), wh = w_hh.contiguous();
  const OptionalTensor bi = contiguous(b_ih), bh = contiguous(b_hh), steps = contiguous(lengths);
  p.lengths = static_cast<const int64_t*>(data(steps));

  const auto empty = [&](at::IntArrayRef sizes) { return fresh(sizes, at::MemoryFormat::Contiguous, x.options()); };
  const Tensor output = empty({p.T, p.N, p.H}), h_n = empty({p.N, p.H});
  const Tensor gates = save_gates ? empty({p.T, p.N, reset_after ? 4 : 3, p.H}) : empty({0});
  const GruFwd arguments{x.const_data_ptr(),  h.const_data_ptr(), wi.const_data_ptr(),
                         wh.const_data_ptr(), data(bi),           data(bh),
                         output.data_ptr(),   h_n.data_ptr(),     save_gates ? gates.data_ptr() : nullptr};
  run(FASTARCH_SELECT(gru_fwd).of[element_type("gru", input)], p, arguments, true);
  return {output, h_n, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_bwd(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input, const Tensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& output, const Tensor& gates, const OptionalTensor& lengths,
    bool reverse, bool reset_after, std::string_view algorithm, std::array<bool, 6> wanted) {
  Gru p = problem(input, h0, w_ih, w_hh, lengths, reverse, reset_after);
  check_algorithm(algorithm);
  check("grad_output", grad_output, {p.T, p.N, p.H}, input), check("grad_h_n", grad_h_n, {p.N, p.H}, input);
  check("output", output, {p.T, p.N, p.H}, input);
  check("gates", gates, {p.T, p.N, reset_after ? 4 : 3, p.H}, input);
  const Tensor x = input.contiguous(), h = h0.contiguous(), wi = w_ih.contiguous(), wh = w_hh.contiguous();
  const Tensor y = output.contiguous(), g = gates.contiguous();
  const OptionalTensor dy = contiguous(grad_output), dh_n = contiguous(grad_h_n), steps = contiguous(lengths);
  p.lengths = static_cast<const int64_t*>(data(steps));

  const std::array<std::vector<int64_t>, 6> sizes{
      {{p.T, p.N, p.C}, {p.N, p.H}, {3 * p.H, p.C}, {3 * p.H, p.H}, {3 * p.H}, {3 * p.H}}};
  std::array<Tensor, 6> grads;
  std::array<void*, 6> to;
  for (size_t i = 0; i < grads.size(); i++) {
    grads[i] = fresh(wanted[i] ? sizes[i] : std::vector<int64_t>{0}, at::MemoryFormat::Contiguous, x.options());
    to[i] = wanted[i] ? grads[i].data_ptr() : nullptr;
  }
  const GruBwd arguments{data(dy),
                         data(dh_n),
                         x.const_data_ptr(),
                         h.const_data_ptr(),
                         wi.const_data_ptr(),
                         wh.const_data_ptr(),
                         y.const_data_ptr(),
                         g.const_data_ptr(),
                         to[0],
                         to[1],
                         to[2],
                         to[3],
                         to[4],
                         to[5]};
  run(FASTARCH_SELECT(gru_bwd).of[element_type("gru", input)], p, arguments, false);
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CPU, m) {
  m.impl("gru_fwd", gru_fwd);
  m.impl("gru_bwd", gru_bwd);
}

}  // namespace fastarch
