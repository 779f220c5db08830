// fastarch::conv_relu_pool_direct_fwd and _bwd on CUDA. Schemas, semantics and friendly errors: ops/conv_relu_pool.py.
// What is checked here keeps a direct call of the operations from reading or writing out of bounds.
#include "cuda/conv_relu_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace fastarch {
namespace {

using at::IntArrayRef;
using at::Tensor;

// Coordinates inside the kernels are 32 bits wide. (Offsets are 64.)
constexpr int64_t kMaxSize = 1 << 26;
constexpr int64_t kMaxStep = 1 << 16;

Dtype dtype_of(const char* name, const Tensor& input) {
  switch (input.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(false, name, ": want float32, float64, bfloat16 or float16, got ", input.scalar_type());
  }
}

void check_like(const char* name, const char* what, const Tensor& t, const Tensor& input, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype && t.device() == input.device(), name, ": want ", what, " of ", dtype,
                   " on ", input.device(), ", got ", t.scalar_type(), " on ", t.device());
}

Tensor4 tensor4(const Tensor& t) {
  return {t.mutable_data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

ConstTensor4 const_tensor4(const Tensor& t) {
  return {t.const_data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

Extent extent(const char* name, const char* what, IntArrayRef value, int64_t least) {
  TORCH_CHECK_VALUE(
      value.size() == 2 && std::min(value[0], value[1]) >= least && std::max(value[0], value[1]) < kMaxStep, name,
      ": want ", what, " as two integers from ", least, " to ", kMaxStep - 1, ", got ", value);
  return {static_cast<int>(value[0]), static_cast<int>(value[1])};
}

int64_t conv_size(int64_t size, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t slack = size + 2 * padding - dilation * (taps - 1) - 1;
  return slack < 0 ? 0 : slack / stride + 1;
}

int64_t pooled_size(int64_t size, int64_t window, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t slack = size + 2 * padding - window + (ceil_mode ? stride - 1 : 0);
  if (slack < 0) return 0;
  const int64_t windows = slack / stride + 1;
  return ceil_mode && (windows - 1) * stride >= size + padding ? windows - 1 : windows;  // the last one starts inside
}

ConvReluPoolShape shape_of(const char* name, const Tensor& input, const Tensor& weight, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view pool,
                           IntArrayRef pool_size, IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode) {
  TORCH_CHECK_VALUE(input.dim() == 4 && weight.dim() == 4 && groups == 1 && input.size(1) == weight.size(1), name,
                    ": want input [N, C, H, W], weight [K, C, R, S] and groups 1, got ", input.sizes(), ", ",
                    weight.sizes(), " and ", groups);
  check_like(name, "weight", weight, input, input.scalar_type());
  TORCH_CHECK_VALUE(pool == "max" || pool == "avg" || pool == "none", name, ": want pool max, avg or none, got ", pool);
  for (const Tensor* t : {&input, &weight}) {
    for (const int64_t size : t->sizes()) {
      TORCH_CHECK_VALUE(size < kMaxSize, name, ": want sizes below ", kMaxSize, ", got ", t->sizes());
    }
  }
  ConvReluPoolShape s = {};
  s.N = static_cast<int>(input.size(0));
  s.C = static_cast<int>(input.size(1));
  s.H = static_cast<int>(input.size(2));
  s.W = static_cast<int>(input.size(3));
  s.K = static_cast<int>(weight.size(0));
  s.R = static_cast<int>(weight.size(2));
  s.S = static_cast<int>(weight.size(3));
  s.stride = extent(name, "stride", stride, 1);
  s.padding = extent(name, "padding", padding, 0);
  s.dilation = extent(name, "dilation", dilation, 1);
  s.pool_size = extent(name, "pool_size", pool_size, 1);
  s.pool_stride = extent(name, "pool_stride", pool_stride, 1);
  s.pool_padding = extent(name, "pool_padding", pool_padding, 0);
  s.average = pool == "avg";

  const int64_t window = int64_t{s.pool_size.h} * s.pool_size.w;
  const int64_t limit = s.average ? 8 : pool == "max" ? 255 : 1;  // one byte of index describes a window
  TORCH_CHECK_VALUE(window <= limit, name, ": want at most ", limit, " elements in a window of pool ", pool,
                    ", got pool_size ", pool_size);
  TORCH_CHECK_VALUE(2 * s.pool_padding.h <= s.pool_size.h && 2 * s.pool_padding.w <= s.pool_size.w, name,
                    ": want pool_padding of at most half of pool_size ", pool_size, ", got ", pool_padding);
  const int64_t OH = conv_size(s.H, s.R, s.stride.h, s.padding.h, s.dilation.h);
  const int64_t OW = conv_size(s.W, s.S, s.stride.w, s.padding.w, s.dilation.w);
  const int64_t PH = pooled_size(OH, s.pool_size.h, s.pool_stride.h, s.pool_padding.h, ceil_mode);
  const int64_t PW = pooled_size(OW, s.pool_size.w, s.pool_stride.w, s.pool_padding.w, ceil_mode);
  TORCH_CHECK_VALUE(std::min({int64_t{s.C}, int64_t{s.K}, int64_t{s.R}, int64_t{s.S}, OH, OW, PH, PW}) > 0, name,
                    ": input ", input.sizes(), " and weight ", weight.sizes(), " leave a convolution of [", OH, ", ",
                    OW, "] and an output of [", PH, ", ", PW, "]");
  s.OH = static_cast<int>(OH);
  s.OW = static_cast<int>(OW);
  s.PH = static_cast<int>(PH);
  s.PW = static_cast<int>(PW);
  const Dtype dtype = dtype_of(name, input);
  TORCH_CHECK_VALUE(conv_relu_pool_fwd_fits(s, dtype) && conv_relu_pool_bwd_weight_fits(s, dtype) &&
                        conv_relu_pool_bwd_input_fits(s, dtype),
                    name, ": want at most 4 input channels, 512 taps and windows that fit shared memory, got input ",
                    input.sizes(), ", weight ", weight.sizes(), ", stride ", stride, ", dilation ", dilation,
                    ", pool_size ", pool_size);
  return s;
}

// As `memory_format` in ops/conv_relu_pool.py.
at::MemoryFormat memory_format(const Tensor& input) {
  const bool channels_last = input.is_contiguous(at::MemoryFormat::ChannelsLast) && !input.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

std::tuple<Tensor, Tensor> conv_relu_pool_direct_fwd(const Tensor& input, const Tensor& weight,
                                                     const std::optional<Tensor>& bias, IntArrayRef stride,
                                                     IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                                     std::string_view pool, IntArrayRef pool_size,
                                                     IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                                                     bool save_index) {
  constexpr const char* name = "conv_relu_pool_direct_fwd";
  const ConvReluPoolShape shape = shape_of(name, input, weight, stride, padding, dilation, groups, pool, pool_size,
                                           pool_stride, pool_padding, ceil_mode);
  Tensor b;
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == shape.K, name, ": want bias [", shape.K, "], got ",
                      bias->sizes());
    check_like(name, "bias", *bias, input, input.scalar_type());
    b = bias->contiguous();
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const Tensor output = at::empty({shape.N, shape.K, shape.PH, shape.PW}, input.options(), memory_format(input));
  const Tensor index =
      save_index ? at::empty_like(output, at::kByte) : at::empty({0}, input.options().dtype(at::kByte));

  ConvReluPoolFwd args = {shape, const_tensor4(input), const_tensor4(weight), nullptr, tensor4(output), nullptr};
  if (b.defined()) args.b = b.const_data_ptr();
  if (save_index) args.index = index.mutable_data_ptr<uint8_t>();
  C10_CUDA_CHECK(conv_relu_pool_fwd(args, dtype_of(name, input), c10::cuda::getCurrentCUDAStream()));
  return {output, index};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_pool_direct_bwd(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& index, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view pool, IntArrayRef pool_size,
    IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode, std::array<bool, 3> output_mask) {
  constexpr const char* name = "conv_relu_pool_direct_bwd";
  const ConvReluPoolShape shape = shape_of(name, input, weight, stride, padding, dilation, groups, pool, pool_size,
                                           pool_stride, pool_padding, ceil_mode);
  const std::array<int64_t, 4> pooled = {shape.N, shape.K, shape.PH, shape.PW};
  TORCH_CHECK_VALUE(grad_output.sizes() == IntArrayRef(pooled) && index.sizes() == IntArrayRef(pooled), name,
                    ": want grad_output and index ", IntArrayRef(pooled), ", got ", grad_output.sizes(), " and ",
                    index.sizes());
  check_like(name, "grad_output", grad_output, input, input.scalar_type());
  check_like(name, "index", index, input, at::kByte);

  const auto [want_input, want_weight, want_bias] = output_mask;
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Dtype dtype = dtype_of(name, input);
  const Tensor none = at::empty({0}, input.options());
  const Tensor grad_input = want_input ? at::empty_like(input, input.options(), memory_format(input)) : none;
  const Tensor grad_weight = want_weight ? at::empty(weight.sizes(), weight.options()) : none;
  const Tensor grad_bias = want_bias ? at::empty({shape.K}, weight.options()) : none;

  if (want_input) {
    const ConvReluPoolBwdInput args = {shape, const_tensor4(grad_output), const_tensor4(index), const_tensor4(weight),
                                       tensor4(grad_input)};
    C10_CUDA_CHECK(conv_relu_pool_bwd_input(args, dtype, stream));
  }
  if (want_weight || want_bias) {
    const int64_t sums = int64_t{shape.K} * (shape.C * shape.R * shape.S + 1);
    const Tensor partial = at::empty({conv_relu_pool_bwd_weight_partials(shape, dtype), sums},
                                     input.options().dtype(dtype == Dtype::float64 ? at::kDouble : at::kFloat));
    const ConvReluPoolBwdWeight args = {shape,
                                        const_tensor4(grad_output),
                                        const_tensor4(index),
                                        const_tensor4(input),
                                        partial.mutable_data_ptr(),
                                        want_weight ? grad_weight.mutable_data_ptr() : nullptr,
                                        want_bias ? grad_bias.mutable_data_ptr() : nullptr};
    C10_CUDA_CHECK(conv_relu_pool_bwd_weight(args, dtype, stream));
  }
  return {grad_input, want_weight ? grad_weight.contiguous(memory_format(weight)) : none, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CUDA, m) {
  m.impl("conv_relu_pool_direct_fwd", &conv_relu_pool_direct_fwd);
  m.impl("conv_relu_pool_direct_bwd", &conv_relu_pool_direct_bwd);
}

}  // namespace fastarch
