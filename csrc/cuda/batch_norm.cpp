// fastarch::batch_norm_persistent_fwd and _bwd on CUDA. Schemas, semantics and friendly errors: ops/batch_norm.py.
// What is checked here keeps a direct call of the operations from reading or writing out of bounds.
#include "cuda/batch_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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

constexpr int64_t kMaxChannels = 1 << 26;       // channel numbers inside the kernels are 32 bits wide
constexpr int64_t kMaxRows = int64_t{1} << 36;  // so are numbers of tiles, of at least 64 rows; offsets are 64

// The values with channels innermost, without gaps: no copy if they lie so already.
Tensor rows_of(const Tensor& t) { return t.movedim(1, -1).contiguous(); }

// A tensor shaped as the input, in any layout, as the input's rows.
Tensor rows_like(const char* name, const char* what, const Tensor& t, const Tensor& input) {
  TORCH_CHECK_VALUE(t.sizes() == input.sizes(), name, ": want ", what, " ", input.sizes(), ", as the input, got ",
                    t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == input.scalar_type() && t.device() == input.device(), name, ": want ", what,
                   " of ", input.scalar_type(), " on ", input.device(), ", got ", t.scalar_type(), " on ", t.device());
  return rows_of(t);
}

// [C], of float32; nothing if there is none.
Tensor per_channel(const char* name, const char* what, const std::optional<Tensor>& t, const Tensor& input) {
  if (!t.has_value()) return {};
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == input.size(1), name, ": want ", what, " [", input.size(1), "], got ",
                    t->sizes());
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat && t->device() == input.device(), name, ": want ", what,
                   " of Float on ", input.device(), ", got ", t->scalar_type(), " on ", t->device());
  return t->contiguous();
}

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// As `is_rows` in ops/batch_norm.py.
void check_rows(const char* name, const Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 2 && input.numel() > 0, name, ": want an input [N, C, ...] that is not empty, got ",
                    input.sizes());
  const bool pixels = input.numel() == input.size(0) * input.size(1);
  const bool rows = input.size(1) > 1 && (pixels || (!input.is_contiguous() && input.movedim(1, -1).is_contiguous()));
  TORCH_CHECK_VALUE(rows, name, ": want an input [N, C], or channels_last with at least 2 channels, got ",
                    input.sizes(), " with strides ", input.strides());
  TORCH_CHECK_VALUE(input.size(1) < kMaxChannels && input.numel() / input.size(1) < kMaxRows, name, ": want less than ",
                    kMaxChannels, " channels and ", kMaxRows, " rows, got ", input.sizes());
}

// As `empty_output` in ops/batch_norm.py.
Tensor empty_output(const Tensor& input) {
  const bool as_it_is = input.movedim(1, -1).is_contiguous();
  return at::empty_like(input, input.options(), as_it_is ? at::MemoryFormat::Preserve : at::MemoryFormat::Contiguous);
}

Tensor partial_of(const BatchNormPlan& plan, const Tensor& input) {
  return at::empty({plan.shares, input.size(1), 2}, input.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_persistent_fwd(const Tensor& input,
                                                                     const std::optional<Tensor>& residual,
                                                                     const std::optional<Tensor>& weight,
                                                                     const std::optional<Tensor>& bias, double eps,
                                                                     bool relu, bool save_mask) {
  constexpr const char* name = "batch_norm_persistent_fwd";
  const Dtype dtype = dtype_of(name, input);
  check_rows(name, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const int64_t C = input.size(1), M = input.numel() / C;
  const Tensor x = rows_of(input), w = per_channel(name, "weight", weight, input),
               b = per_channel(name, "bias", bias, input),
               r = residual.has_value() ? rows_like(name, "residual", *residual, input) : Tensor();

  const Tensor output = empty_output(input);
  const Tensor mean = at::empty({C}, input.options().dtype(at::kFloat)), var = at::empty_like(mean);
  const at::TensorOptions bytes = input.options().dtype(at::kByte);
  const Tensor mask = save_mask ? at::empty({M, (C + 7) / 8}, bytes) : at::empty({0}, bytes);

  BatchNormFwd args = {};
  args.M = M;
  args.C = static_cast<int>(C);
  args.eps = static_cast<float>(eps);
  args.relu = relu;
  args.x = x.const_data_ptr();
  args.residual = r.defined() ? r.const_data_ptr() : nullptr;
  args.weight = floats(w);
  args.bias = floats(b);
  args.y = output.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr<float>();
  args.var = var.mutable_data_ptr<float>();
  args.mask = save_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  BatchNormPlan plan;
  C10_CUDA_CHECK(plan_batch_norm_fwd(args, dtype, plan));
  const Tensor partial = partial_of(plan, input);
  C10_CUDA_CHECK(
      batch_norm_fwd(args, plan, partial.mutable_data_ptr<float>(), dtype, c10::cuda::getCurrentCUDAStream()));
  return {output, mean, var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_persistent_bwd(const Tensor& grad_output, const Tensor& input,
                                                                     const std::optional<Tensor>& mask,
                                                                     const std::optional<Tensor>& weight,
                                                                     const std::optional<Tensor>& bias,
                                                                     const Tensor& mean, const Tensor& var, double eps,
                                                                     bool relu, std::array<bool, 4> output_mask) {
  constexpr const char* name = "batch_norm_persistent_bwd";
  const Dtype dtype = dtype_of(name, input);
  check_rows(name, input);
  const c10::cuda::CUDAGuard guard(input.device());
  const int64_t C = input.size(1), M = input.numel() / C;
  const Tensor x = rows_of(input), dy = rows_like(name, "grad_output", grad_output, input),
               w = per_channel(name, "weight", weight, input), b = per_channel(name, "bias", bias, input),
               m = per_channel(name, "mean", mean, input), v = per_channel(name, "var", var, input);
  Tensor passed;
  if (relu && mask.has_value()) {
    const std::array<int64_t, 2> want = {M, (C + 7) / 8};
    TORCH_CHECK_VALUE(mask->sizes() == at::IntArrayRef(want), name, ": want mask ", at::IntArrayRef(want), ", got ",
                      mask->sizes());
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kByte && mask->device() == input.device(), name,
                     ": want mask of Byte on ", input.device(), ", got ", mask->scalar_type(), " on ", mask->device());
    passed = mask->contiguous();
  }

  const auto [want_input, want_residual, want_weight, want_bias] = output_mask;
  const auto result = [&](bool wanted) { return wanted ? empty_output(input) : at::empty({0}, input.options()); };
  const auto sums = [&](bool wanted) { return at::empty({wanted ? C : 0}, mean.options()); };
  const Tensor grad_input = result(want_input), grad_residual = result(want_residual);
  const Tensor grad_weight = sums(want_weight), grad_bias = sums(want_bias);

  BatchNormBwd args = {};
  args.M = M;
  args.C = static_cast<int>(C);
  args.eps = static_cast<float>(eps);
  args.relu = relu;
  args.dy = dy.const_data_ptr();
  args.x = x.const_data_ptr();
  args.mask = passed.defined() ? passed.const_data_ptr<uint8_t>() : nullptr;
  args.weight = floats(w);
  args.bias = floats(b);
  args.mean = floats(m);
  args.var = floats(v);
  args.dx = want_input ? grad_input.mutable_data_ptr() : nullptr;
  args.dz = want_residual ? grad_residual.mutable_data_ptr() : nullptr;
  args.dweight = want_weight ? grad_weight.mutable_data_ptr<float>() : nullptr;
  args.dbias = want_bias ? grad_bias.mutable_data_ptr<float>() : nullptr;
  BatchNormPlan plan;
  C10_CUDA_CHECK(plan_batch_norm_bwd(args, dtype, plan));
  const Tensor partial = partial_of(plan, input);
  C10_CUDA_CHECK(
      batch_norm_bwd(args, plan, partial.mutable_data_ptr<float>(), dtype, c10::cuda::getCurrentCUDAStream()));
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CUDA, m) {
  m.impl("batch_norm_persistent_fwd", &batch_norm_persistent_fwd);
  m.impl("batch_norm_persistent_bwd", &batch_norm_persistent_bwd);
}

}  // namespace fastarch
