// batch_norm on CPUs, the torch side: checks, outputs, threads, registration.
#include "cpu/batch_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace fastarch {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Whether memory holds nothing but the elements, in the order that kernels walk them.
bool is_dense(const Tensor& t, bool rows) {
  if (!rows) return t.is_contiguous();
  int64_t step = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = t.size(dim) == 1 || t.stride(dim) == step;
    step *= t.size(dim);
    return fits;
  };
  bool dense = follows(1);
  for (int64_t dim = t.dim() - 1; dim > 1; dim--) dense = follows(dim) && dense;
  return follows(0) && dense;
}

// Rows of C channels, or planes: see fastarch/ops/batch_norm.py.
bool is_rows(const Tensor& x) {
  if (x.size(1) == 1) return false;
  if (c10::multiply_integers(x.sizes().slice(2)) == 1) return true;
  return !x.is_contiguous() && is_dense(x, true);
}

// The public function in Python explains bad arguments; these checks keep a direct call of the operation in bounds.
BatchNorm problem(const Tensor& x, double eps, bool relu) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(1) > 0, "batch_norm: want input [N, C, ...], got ", x.sizes());
  BatchNorm p{x.size(0), x.size(1), c10::multiply_integers(x.sizes().slice(2)), is_rows(x), relu, eps};
  if (p.rows) p.N *= p.S, p.S = 1;
  return p;
}

void check_algorithm(std::string_view algorithm) {
  TORCH_CHECK_VALUE(algorithm == "two_pass", "batch_norm: want algorithm two_pass on CPUs, got ", algorithm);
}

void check_channels(const char* what, const OptionalTensor& t, const Tensor& x) {
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(!t || t->scalar_type() == dtype, "batch_norm: want ", what, " of ", dtype, " for input of ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(!t || (t->dim() == 1 && t->size(0) == x.size(1) && t->device() == x.device()), "batch_norm: want ",
                    what, " [", x.size(1), "] on ", x.device());
}

// A tensor beside x, in x's layout.
Tensor beside(const char* what, const Tensor& t, const Tensor& x, bool rows) {
  TORCH_CHECK_VALUE(t.sizes() == x.sizes() && t.device() == x.device(), "batch_norm: want ", what, " ", x.sizes(),
                    ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "batch_norm: input is ", x.scalar_type(), ", ", what, " is ",
                   t.scalar_type());
  return is_dense(t, rows) ? t : at::empty_like(x).copy_(t);
}

Tensor dense(const Tensor& x, bool rows) { return is_dense(x, rows) ? x : x.contiguous(); }

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

std::vector<int64_t> mask_sizes(const BatchNorm& p) {
  return p.rows ? std::vector<int64_t>{p.N, mask_bytes(p.C)} : std::vector<int64_t>{p.N * p.C, mask_bytes(p.S)};
}

// How many parts of N have statistics of their own: enough for many threads, each long enough to be worth merging, and
// fewer where there are many channels to merge. No more than one where channels give work enough: a channel of planes
// is then normalised while the cache holds it.
int64_t parts_of(const BatchNorm& p) {
  constexpr int64_t FEW = 16, MANY = 64, ELEMENTS = 32768;
  if (!p.rows) return p.C >= FEW ? 1 : std::min(p.N, (FEW + p.C - 1) / p.C);
  const int64_t most = std::clamp(ELEMENTS / p.C, FEW, MANY);
  return std::clamp<int64_t>(p.N * p.C / ELEMENTS, 1, std::min(most, p.N));
}

double operations(const BatchNorm& p) { return 8.0 * p.N * p.C * p.S; }

// Runs run(n, c) on all of x, in pieces that lie together in memory.
template <class Run>
void everywhere(const BatchNorm& p, const Run& run) {
  const int64_t pieces = 8 * at::get_num_threads();
  const int64_t of_n = p.rows ? std::min(p.N, pieces) : p.N;
  const int64_t of_c = p.rows ? 1 : std::clamp<int64_t>((pieces + p.N - 1) / p.N, 1, p.C);
  parallel(of_n * of_c, 0, operations(p),
           [&](int64_t task, void*) { run(part_of(p.N, of_n, task / of_c), part_of(p.C, of_c, task % of_c)); });
}

// Runs run(n, c, part, scratch) on all parts: of all channels in rows, of few in planes, one unless they are small.
template <class Run>
void by_parts(const BatchNorm& p, int64_t parts, int64_t scratch_bytes, const Run& run) {
  constexpr int64_t ELEMENTS = 1024, RANGES = 16;  // a stream that is worth following; work for some threads
  const int64_t together = std::clamp<int64_t>(std::min(ELEMENTS / p.S, p.C / RANGES), 1, CHANNELS_TOGETHER);
  const int64_t of_c = p.rows ? 1 : (p.C + together - 1) / together;
  parallel(parts * of_c, scratch_bytes, operations(p), [&](int64_t task, void* scratch) {
    run(part_of(p.N, parts, task / of_c), part_of(p.C, of_c, task % of_c), task / of_c, scratch);
  });
}

// Runs run(c) on all channels, in ranges that are worth a thread where there are many parts to merge.
template <class Run>
void by_channels(const BatchNorm& p, int64_t parts, const Run& run) {
  const int64_t ranges = std::min<int64_t>(p.C, 16);
  parallel(ranges, 0, 16.0 * parts * p.C, [&](int64_t i, void*) { run(part_of(p.C, ranges, i)); });
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& input) {
  const BatchNorm p = problem(input, 0, false);
  const BatchNormFwd& kernel = FASTARCH_SELECT(batch_norm_fwd).of[element_type("batch_norm", input)];
  const auto options = input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (input.numel() == 0) return {at::zeros({p.C}, options), at::zeros({p.C}, options)};
  const Tensor x = dense(input, p.rows), mean = at::empty({p.C}, options), var = at::empty({p.C}, options);
  const int64_t parts = parts_of(p);
  const Tensor moments = at::empty({parts, 2, p.C}, x.options().dtype(at::kDouble));
  by_parts(p, parts, kernel.scratch_bytes(p), [&](Range n, Range c, int64_t part, void* scratch) {
    kernel.moments(p, x.const_data_ptr(), n, c, moments.data_ptr<double>() + 2 * part * p.C, scratch);
  });
  by_channels(p, parts, [&](Range c) {
    kernel.statistics(p, moments.const_data_ptr<double>(), parts, c, mean.data_ptr(), var.data_ptr());
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor& input, const OptionalTensor& residual,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          const OptionalTensor& given_mean,
                                                          const OptionalTensor& given_var, double eps, bool relu,
                                                          bool save_mask, std::string_view algorithm) {
  const BatchNorm p = problem(input, eps, relu);
  const BatchNormFwd& kernel = FASTARCH_SELECT(batch_norm_fwd).of[element_type("batch_norm", input)];
  check_algorithm(algorithm);
  check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_channels("mean", given_mean, input), check_channels("var", given_var, input);
  TORCH_CHECK_VALUE(given_mean.has_value() == given_var.has_value(), "batch_norm: want both mean and var, or neither");
  TORCH_CHECK_VALUE(relu || !save_mask, "batch_norm: there is no mask to save without ReLU");
  const Tensor x = dense(input, p.rows);
  const OptionalTensor r = residual ? OptionalTensor(beside("residual", *residual, x, p.rows)) : std::nullopt;
  const OptionalTensor w = contiguous(weight), b = contiguous(bias);

  const Tensor y = fresh(x.sizes(), x.strides(), x.options());
  const Tensor mask =
      save_mask ? at::empty(mask_sizes(p), x.options().dtype(at::kByte)) : at::empty({0}, x.options().dtype(at::kByte));
  const auto options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  uint8_t* bits = save_mask ? mask.data_ptr<uint8_t>() : nullptr;
  const Tensor memory = workspace(kernel.constants_bytes(p));
  const Affine affine{data(w), data(b)};
  const auto apply = [&](Range n, Range c) {
    kernel.apply(p, x.const_data_ptr(), data(r), memory.data_ptr(), y.data_ptr(), bits, n, c);
  };
  const int64_t statistics = given_mean ? 0 : p.C;
  const Tensor mean = at::empty({statistics}, options), var = at::empty({statistics}, options);
  if (x.numel() == 0) return {y, mean.zero_(), var.zero_(), mask};
  if (given_mean) {
    const OptionalTensor m = contiguous(given_mean), v = contiguous(given_var);
    kernel.constants(p, affine, data(m), data(v), {0, p.C}, memory.data_ptr());
    everywhere(p, apply);
    return {y, mean, var, mask};
  }
  const int64_t parts = parts_of(p);
  const Tensor moments = at::empty({parts, 2, p.C}, x.options().dtype(at::kDouble));
  const auto merge = [&](Range c) {
    kernel.statistics(p, moments.const_data_ptr<double>(), parts, c, mean.data_ptr(), var.data_ptr());
    kernel.constants(p, affine, mean.const_data_ptr(), var.const_data_ptr(), c, memory.data_ptr());
  };
  const bool at_once = !p.rows && parts == 1;  // a channel is normalised while the cache holds it
  by_parts(p, parts, kernel.scratch_bytes(p), [&](Range n, Range c, int64_t part, void* scratch) {
    kernel.moments(p, x.const_data_ptr(), n, c, moments.data_ptr<double>() + 2 * part * p.C, scratch);
    if (at_once) merge(c), apply(n, c);
  });
  if (!at_once) by_channels(p, parts, merge), everywhere(p, apply);
  return {y, mean, var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& grad_output, const Tensor& input,
                                                          const OptionalTensor& mask, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, const Tensor& given_mean,
                                                          const Tensor& given_var, const OptionalTensor& mean_dz,
                                                          const OptionalTensor& mean_dz_xhat, double eps, bool relu,
                                                          bool training, std::string_view algorithm,
                                                          std::array<bool, 4> wanted) {
  BatchNorm p = problem(input, eps, relu);
  p.centred = training || mean_dz;
  const BatchNormBwd& kernel = FASTARCH_SELECT(batch_norm_bwd).of[element_type("batch_norm", input)];
  check_algorithm(algorithm);
  check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_channels("mean", given_mean, input), check_channels("var", given_var, input);
  check_channels("mean_dz", mean_dz, input), check_channels("mean_dz_xhat", mean_dz_xhat, input);
  TORCH_CHECK_VALUE(mean_dz.has_value() == mean_dz_xhat.has_value(),
                    "batch_norm: want both mean_dz and mean_dz_xhat, or neither");
  TORCH_CHECK_VALUE(!mask || (relu && mask->scalar_type() == at::kByte && mask->sizes() == mask_sizes(p)),
                    "batch_norm: want a mask ", at::IntArrayRef(mask_sizes(p)), " of bytes, of ReLU");
  const Tensor x = dense(input, p.rows), dy = beside("grad_output", grad_output, x, p.rows);
  const OptionalTensor w = contiguous(weight), b = contiguous(bias), m = contiguous(mask);
  const Tensor mean = given_mean.contiguous(), var = given_var.contiguous();

  const auto [want_x, want_residual, want_weight, want_bias] = wanted;
  const auto beside_x = [&](bool want) {
    return want ? fresh(x.sizes(), x.strides(), x.options()) : at::empty({0}, x.options());
  };
  const auto by_channel = [&](bool want) { return at::empty({want ? p.C : 0}, mean.options()); };
  const Tensor dx = beside_x(want_x), dresidual = beside_x(want_residual);
  const Tensor dweight = by_channel(want_weight), dbias = by_channel(want_bias);
  if (x.numel() == 0) return {dx, dresidual, dweight.zero_(), dbias.zero_()};

  const Tensor memory = workspace(kernel.constants_bytes(p));
  const uint8_t* bits = static_cast<const uint8_t*>(data(m));
  kernel.constants(p, {data(w), data(b)}, mean.const_data_ptr(), var.const_data_ptr(), {0, p.C}, memory.data_ptr());
  const OptionalTensor dz = contiguous(mean_dz), dz_xhat = contiguous(mean_dz_xhat);
  if (dz) kernel.means(p, var.const_data_ptr(), data(dz), data(dz_xhat), {0, p.C}, memory.data_ptr());
  const auto apply = [&](Range n, Range c) {
    if (want_x || want_residual)
      kernel.apply(p, dy.const_data_ptr(), x.const_data_ptr(), bits, memory.data_ptr(),
                   want_x ? dx.data_ptr() : nullptr, want_residual ? dresidual.data_ptr() : nullptr, n, c);
  };
  const bool from_batch = training && !mean_dz;  // dx needs the means, and they are those of this batch
  if (!want_weight && !want_bias && !(from_batch && want_x)) {
    everywhere(p, apply);
    return {dx, dresidual, dweight, dbias};
  }
  const int64_t parts = parts_of(p);
  const Tensor sums = at::empty({parts, 2, p.C}, x.options().dtype(at::kDouble));
  const auto merge = [&](Range c) {
    kernel.gradients(p, var.const_data_ptr(), sums.const_data_ptr<double>(), parts, c,
                     from_batch ? memory.data_ptr() : nullptr, want_weight ? dweight.data_ptr() : nullptr,
                     want_bias ? dbias.data_ptr() : nullptr);
  };
  const bool at_once = !p.rows && parts == 1;
  by_parts(p, parts, kernel.scratch_bytes(p), [&](Range n, Range c, int64_t part, void* scratch) {
    kernel.sums(p, dy.const_data_ptr(), x.const_data_ptr(), bits, memory.data_ptr(), n, c,
                sums.data_ptr<double>() + 2 * part * p.C, scratch);
    if (at_once) merge(c), apply(n, c);
  });
  if (!at_once) by_channels(p, parts, merge), everywhere(p, apply);
  return {dx, dresidual, dweight, dbias};
}

// The bits of torch's lerp, which other dtypes take.
template <class T>
void move_towards(const Tensor& running, const Tensor& of_the_batch, T factor, T momentum) {
  T* const r = running.data_ptr<T>();
  const T* const s = of_the_batch.const_data_ptr<T>();
  for (int64_t c = 0, step = running.stride(0); c < running.size(0); c++) {
    const T target = s[c] * factor, before = r[c * step], way = target - before;
    r[c * step] = momentum < T(0.5) ? std::fma(momentum, way, before) : std::fma(momentum - 1, way, target);
  }
  running.unsafeGetTensorImpl()->bump_version();
}

void batch_norm_update(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                       double momentum, double unbias) {
  const auto dtype = mean.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "batch_norm: want mean of ", at::kFloat, " or ",
                   at::kDouble, ", got ", dtype);
  for (const Tensor* t : {&running_mean, &running_var, &mean, &var})
    TORCH_CHECK_VALUE(t->dim() == 1 && t->sizes() == mean.sizes() && t->scalar_type() == dtype && t->is_cpu(),
                      "batch_norm: want statistics ", mean.sizes(), " of ", dtype, ", got ", t->sizes(), " of ",
                      t->scalar_type());
  for (const Tensor* t : {&running_mean, &running_var})
    TORCH_CHECK(t->stride(0) != 0 || t->size(0) <= 1, "batch_norm: want running statistics in memory of their own");
  const Tensor m = mean.contiguous(), v = var.contiguous();
  if (dtype == at::kDouble) {
    move_towards<double>(running_mean, m, 1, momentum), move_towards<double>(running_var, v, unbias, momentum);
  } else {
    move_towards<float>(running_mean, m, 1, momentum), move_towards<float>(running_var, v, unbias, momentum);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CPU, m) {
  m.impl("batch_norm_stats", batch_norm_stats);
  m.impl("batch_norm_fwd", batch_norm_fwd);
  m.impl("batch_norm_bwd", batch_norm_bwd);
  m.impl("batch_norm_update", batch_norm_update);
}

}  // namespace fastarch
