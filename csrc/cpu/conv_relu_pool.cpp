// conv_relu_pool on CPUs, the torch side: checks, outputs, threads, registration.
#include "cpu/conv_relu_pool.h"

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace fastarch {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The schema's arguments between the tensors and the algorithm.
struct Geometry {
  IntArrayRef stride, padding, dilation;
  int64_t groups;
  std::string_view pool;
  IntArrayRef pool_size, pool_stride, pool_padding;
  bool ceil_mode;
};

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

int64_t conv_size(int64_t n, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return floor_div(n + 2 * padding - dilation * (kernel - 1) - 1, stride) + 1;
}

int64_t pooled_size(int64_t n, int64_t size, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t windows = floor_div(n + 2 * padding - size + (ceil_mode ? stride - 1 : 0), stride) + 1;
  return ceil_mode && (windows - 1) * stride >= n + padding ? windows - 1 : windows;
}

// Of output and gradients: channels_last where the tensor is laid out so and is not contiguous as well.
at::MemoryFormat memory_format(const Tensor& t) {
  const bool channels_last = t.is_contiguous(at::MemoryFormat::ChannelsLast) && !t.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Strides4 strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// The public function in Python explains bad arguments; these checks keep a direct call of the operation in bounds.
ConvReluPool problem(const Tensor& x, const Tensor& weight, const Geometry& g) {
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4,
                    "conv_relu_pool: want input [N, C, H, W] and weight [K, C/groups, R, S], got ", x.sizes(), " and ",
                    weight.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "conv_relu_pool: input is ", x.scalar_type(),
                   ", weight is ", weight.scalar_type());
  TORCH_CHECK_VALUE(
      g.groups > 0 && weight.size(0) % g.groups == 0 && x.size(1) == weight.size(1) * g.groups && weight.numel() > 0,
      "conv_relu_pool: want weight [K, C/groups, R, S] for input ", x.sizes(), " and groups ", g.groups, ", got ",
      weight.sizes());
  const auto all_at_least = [](IntArrayRef values, int64_t least) {
    constexpr int64_t MOST = int64_t(1) << 30;  // keeps products of two in range
    return values.size() == 2 && std::min(values[0], values[1]) >= least && std::max(values[0], values[1]) <= MOST;
  };
  TORCH_CHECK_VALUE(
      all_at_least(g.stride, 1) && all_at_least(g.padding, 0) && all_at_least(g.dilation, 1) &&
          all_at_least(g.pool_size, 1) && all_at_least(g.pool_stride, 1) && all_at_least(g.pool_padding, 0) &&
          2 * g.pool_padding[0] <= g.pool_size[0] && 2 * g.pool_padding[1] <= g.pool_size[1],
      "conv_relu_pool: want stride, dilation, pool_size, pool_stride >= 1 and 0 <= 2 pool_padding <= pool_size");
  const bool average = g.pool == "avg";
  TORCH_CHECK_VALUE(average || g.pool == "max" || g.pool == "none", "conv_relu_pool: want pool max, avg or none, got ",
                    g.pool);
  TORCH_CHECK_VALUE(g.pool_size[0] * g.pool_size[1] <= (average ? AVG_WINDOW : MAX_WINDOW),
                    "conv_relu_pool: pool window ", g.pool_size, " is too large");

  ConvReluPool p{};
  p.N = x.size(0), p.G = g.groups, p.C = weight.size(1), p.H = x.size(2), p.W = x.size(3);
  p.K = weight.size(0) / g.groups, p.R = weight.size(2), p.S = weight.size(3);
  p.stride_h = g.stride[0], p.stride_w = g.stride[1], p.padding_h = g.padding[0], p.padding_w = g.padding[1];
  p.dilation_h = g.dilation[0], p.dilation_w = g.dilation[1];
  p.pool_h = g.pool_size[0], p.pool_w = g.pool_size[1], p.pool_stride_h = g.pool_stride[0],
  p.pool_stride_w = g.pool_stride[1];
  p.pool_padding_h = g.pool_padding[0], p.pool_padding_w = g.pool_padding[1];
  p.average = average, p.relu = true;
  const int64_t taps = p.R * p.S;
  p.w = memory_format(weight) == at::MemoryFormat::ChannelsLast ? FilterStrides{p.C * taps, 1, p.C}
                                                                : FilterStrides{p.C * taps, taps, 1};
  p.OH = conv_size(p.H, p.R, p.stride_h, p.padding_h, p.dilation_h);
  p.OW = conv_size(p.W, p.S, p.stride_w, p.padding_w, p.dilation_w);
  p.PH = pooled_size(p.OH, p.pool_h, p.pool_stride_h, p.pool_padding_h, g.ceil_mode);
  p.PW = pooled_size(p.OW, p.pool_w, p.pool_stride_w, p.pool_padding_w, g.ceil_mode);
  TORCH_CHECK_VALUE(p.OH > 0 && p.OW > 0 && p.PH > 0 && p.PW > 0, "conv_relu_pool: input ", x.sizes(), " and weight ",
                    weight.sizes(), " leave nothing to compute");
  p.threads = at::get_num_threads();
  return p;
}

double operations(const ConvReluPool& p) { return 2.0 * p.N * p.G * p.K * p.OH * p.OW * p.C * p.R * p.S; }

// The kernels of an algorithm, if it can serve the problem.
const ConvReluPoolFwds& forward(const ConvReluPool& p, std::string_view algorithm) {
  if (algorithm == "direct") return FASTARCH_SELECT(conv_relu_pool_direct);
  const bool undilated = p.dilation_h == 1 && p.dilation_w == 1;
  if (algorithm == "polyphase") {
    TORCH_CHECK_VALUE(undilated && p.R <= 4 * p.stride_h && p.S <= 4 * p.stride_w,
                      "conv_relu_pool: polyphase wants dilation 1 and a filter of at most 4 strides");
    return FASTARCH_SELECT(conv_relu_pool_polyphase);
  }
  TORCH_CHECK_VALUE(algorithm == "winograd",
                    "conv_relu_pool: want algorithm direct, winograd, polyphase or library on CPUs, got ", algorithm);
  const bool tiles_are_windows = p.pool_h == 2 && p.pool_w == 2 && p.pool_stride_h == 2 && p.pool_stride_w == 2 &&
                                 !p.pool_padding_h && !p.pool_padding_w && p.PH == p.OH / 2 && p.PW == p.OW / 2;
  const bool unpooled = p.pool_h == 1 && p.pool_w == 1 && p.PH == p.OH && p.PW == p.OW && !p.average;
  TORCH_CHECK_VALUE(
      undilated && p.R == 3 && p.S == 3 && p.stride_h == 1 && p.stride_w == 1 && (tiles_are_windows || unpooled),
      "conv_relu_pool: winograd wants a 3x3 filter, stride and dilation 1, and a pool of 2x2 or none");
  return FASTARCH_SELECT(conv_relu_pool_winograd);
}

struct Operands {
  const void *x, *w, *a, *b, *r;  // a, b and r, and index, may be nullptr
  void* y;
  uint8_t* index;
};

// All filters are packed first, whose blocks every thread then reads.
void run_by_places(const ConvReluPool& p, const ConvReluPoolFwd& kernel, const Operands& of) {
  const Tensor packed = workspace(kernel.packed_bytes(p));
  parallel(kernel.pack_tasks(p), 0, 16.0 * p.G * p.K * p.C * p.R * p.S,
           [&](int64_t task, void*) { kernel.pack(p, of.w, of.a, of.b, packed.data_ptr(), task); });
  parallel(kernel.tasks(p), kernel.scratch_bytes(p), operations(p), [&](int64_t task, void* scratch) {
    kernel.run(p, of.x, packed.data_ptr(), of.r, of.y, of.index, task, scratch);
  });
}

// The operands from their k-th output channel on; elements in bytes.
Operands from_channel(const ConvReluPool& p, const Operands& of, int64_t k, int64_t element, int64_t element_of_a) {
  const auto after = [](auto* start, int64_t bytes) {
    return start ? (decltype(start))((const uint8_t*)start + bytes) : start;
  };
  const int64_t of_y = k * p.y.c * element;
  return {of.x,
          after(of.w, k * p.w.k * element),
          after(of.a, k * element_of_a),
          after(of.b, k * element),
          after(of.r, of_y),
          after(of.y, of_y),
          after(of.index, k * p.index.c)};
}

// A task is some output channels: it packs their filters, which no other core has to fetch then, for all of the input.
void run_by_channels(const ConvReluPool& p, const ConvReluPoolFwd& kernel, const Operands& all, int64_t channels,
                     int64_t element, int64_t element_of_a) {
  const int64_t tasks = (p.K + channels - 1) / channels;
  const auto problem_of = [&](int64_t task) {
    ConvReluPool q = p;
    q.K = std::min(channels, p.K - task * channels), q.threads = 1;
    return q;
  };
  const ConvReluPool first = problem_of(0), last = problem_of(tasks - 1);
  const int64_t packed_bytes = (std::max(kernel.packed_bytes(first), kernel.packed_bytes(last)) + 63) / 64 * 64;
  const int64_t scratch_bytes = std::max(kernel.scratch_bytes(first), kernel.scratch_bytes(last));
  parallel(tasks, packed_bytes + scratch_bytes, operations(p), [&](int64_t task, uint8_t* packed) {
    const ConvReluPool q = problem_of(task);
    const Operands of = from_channel(p, all, task * channels, element, element_of_a);
    for (int64_t i = 0; i < kernel.pack_tasks(q); i++) kernel.pack(q, of.w, of.a, of.b, packed, i);
    for (int64_t i = 0; i < kernel.tasks(q); i++)
      kernel.run(q, of.x, packed, of.r, of.y, of.index, i, packed + packed_bytes);
  });
}

// Output channels of a task where packed filters outweigh what all threads then read of the input: 1x512x7x7->512 k3
// 4.3 -> 1.4 ms on two cores (Zen 4), 1x256x14x14->256 1.6 -> 0.7, 1x512x7x7->2048 k1 0.9 -> 0.8.
int64_t channels_at_once(const ConvReluPool& p, const ConvReluPoolFwd& kernel, int64_t element) {
  constexpr int64_t VECTORS = 32;  // two of the longest vectors: blocks of the products stay whole
  const bool outweigh = kernel.packed_bytes(p) >= (p.threads - 1) * p.N * p.C * p.H * p.W * element;
  if (p.G > 1 || p.threads == 1 || !outweigh) return p.K;
  return ((p.K + p.threads - 1) / p.threads + VECTORS - 1) / VECTORS * VECTORS;
}

void run(const ConvReluPool& p, const ConvReluPoolFwd& kernel, const Operands& operands, int64_t element,
         int64_t element_of_a) {
  const int64_t channels = channels_at_once(p, kernel, element);
  if (channels < p.K) {
    run_by_channels(p, kernel, operands, channels, element, element_of_a);
  } else {
    run_by_places(p, kernel, operands);
  }
}

std::tuple<Tensor, Tensor> conv_relu_pool_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                              int64_t groups, std::string_view pool, IntArrayRef pool_size,
                                              IntArrayRef pool_stride, IntArrayRef pool_padding, bool ceil_mode,
                                              std::string_view algorithm, bool save_index, const OptionalTensor& scale,
                                              const OptionalTensor& residual, bool relu) {
  ConvReluPool p =
      problem(x, weight, {stride, padding, dilation, groups, pool, pool_size, pool_stride, pool_padding, ceil_mode});
  p.relu = relu;
  const ElementType type = element_type("conv_relu_pool", x);
  TORCH_CHECK_VALUE(relu || (pool == "none" && !save_index && algorithm != "library"),
                    "conv_relu_pool: without ReLU want neither pool nor index nor a library's convolution");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "conv_relu_pool: want bias [",
                    weight.size(0), "]");
  TORCH_CHECK_TYPE(!bias || bias->scalar_type() == x.scalar_type(), "conv_relu_pool: input is ", x.scalar_type(),
                   ", bias is ", bias->scalar_type());
  TORCH_CHECK_VALUE(!scale || (scale->dim() == 1 && scale->size(0) == weight.size(0)), "conv_relu_pool: want scale [",
                    weight.size(0), "]");
  TORCH_CHECK_TYPE(!scale || scale->scalar_type() == at::toOpMathType(x.scalar_type()),
                   "conv_relu_pool: want scale as ", at::toOpMathType(x.scalar_type()), ", got ", scale->scalar_type());
  const std::array<int64_t, 4> convolution{p.N, p.G * p.K, p.OH, p.OW};
  TORCH_CHECK_VALUE(!residual || (pool == "none" && !save_index && residual->sizes() == IntArrayRef(convolution)),
                    "conv_relu_pool: want a residual of the convolution's ", IntArrayRef(convolution),
                    " with neither pool nor index, got ", residual->sizes());
  TORCH_CHECK_TYPE(!residual || residual->scalar_type() == x.scalar_type(), "conv_relu_pool: input is ",
                   x.scalar_type(), ", residual is ", residual->scalar_type());

  const Tensor y = fresh({p.N, p.G * p.K, p.PH, p.PW}, memory_format(x), x.options());
  const auto bytes = x.options().dtype(at::kByte);
  const Tensor index = save_index ? fresh(y.sizes(), y.strides(), bytes) : at::empty({0}, bytes);
  p.x = strides_of(x), p.y = strides_of(y);
  if (save_index) p.index = strides_of(index);
  if (y.numel() == 0) return {y, index};
  const Tensor added = residual ? residual->contiguous(memory_format(x)) : Tensor();  // as y is
  const void* r = residual ? added.const_data_ptr() : nullptr;
  uint8_t* at = save_index ? index.data_ptr<uint8_t>() : nullptr;
  const Tensor filters = weight.contiguous(memory_format(weight));
  const Tensor a = scale ? scale->contiguous() : Tensor(), b = bias ? bias->contiguous() : Tensor();

  if (algorithm == "library") {
    TORCH_CHECK_VALUE(!scale, "conv_relu_pool: a library's convolution takes no scale");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor conv = at::convolution(x.contiguous(at::MemoryFormat::ChannelsLast), filters, bias, stride, padding,
                                        dilation, false, {0, 0}, groups)
                            .contiguous(at::MemoryFormat::ChannelsLast);
    const ConvReluPoolFwd& kernel = FASTARCH_SELECT(conv_relu_pool_library).of[type];
    parallel(kernel.tasks(p), kernel.scratch_bytes(p), double(conv.numel()), [&](int64_t task, void* scratch) {
      kernel.run(p, conv.const_data_ptr(), nullptr, r, y.data_ptr(), at, task, scratch);
    });
    return {y, index};
  }
  const ConvReluPoolFwd& kernel = forward(p, algorithm).of[type];
  const Operands operands{x.const_data_ptr(),
                          filters.const_data_ptr(),
                          scale ? a.const_data_ptr() : nullptr,
                          bias ? b.const_data_ptr() : nullptr,
                          r,
                          y.data_ptr(),
                          at};
  run(p, kernel, operands, x.element_size(), scale ? a.element_size() : 0);
  return {y, index};
}

// The gradient of the input where nothing is pooled, as a convolution: of dy with the filters turned by half a turn,
// and with input and output channels exchanged.
ConvReluPool adjoint(const ConvReluPool& p) {
  ConvReluPool q = p;
  q.C = p.K, q.H = p.OH, q.W = p.OW, q.K = p.C, q.OH = q.PH = p.H, q.OW = q.PW = p.W;
  q.padding_h = p.R - 1 - p.padding_h, q.padding_w = p.S - 1 - p.padding_w;
  q.x = p.y, q.y = p.x, q.w = {p.w.c, p.w.k, p.w.tap};
  q.relu = false, q.turned = true;
  return q;
}

// The gradient that ReLU lets through, where nothing is pooled. It is copied as bits, without a branch on the index:
// 8x64x56x56 0.5 ms instead of 2.6.
Tensor surviving(const Tensor& dy, const Tensor& index, at::MemoryFormat format) {
  const Tensor from = dy.contiguous(format), cut = index.contiguous(format),
               to = fresh(dy.sizes(), format, dy.options());
  const auto copy = [&](auto element) {
    using Element = decltype(element);
    const auto* dy = static_cast<const Element*>(from.const_data_ptr());
    const uint8_t* index = cut.const_data_ptr<uint8_t>();
    auto* g = static_cast<Element*>(to.data_ptr());
    constexpr int64_t CHUNK = 1 << 14;
    const int64_t n = to.numel();
    parallel((n + CHUNK - 1) / CHUNK, 0, double(n), [=](int64_t task, void*) {
      const int64_t begin = task * CHUNK, end = std::min(n, begin + CHUNK);
      for (int64_t i = begin; i < end; i++) g[i] = dy[i] & Element(Element(index[i] != 0) - 1);
    });
  };
  dy.element_size() == 2 ? copy(uint16_t()) : dy.element_size() == 4 ? copy(uint32_t()) : copy(uint64_t());
  return to;
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_pool_bwd(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                                      const Tensor& index, IntArrayRef stride, IntArrayRef padding,
                                                      IntArrayRef dilation, int64_t groups, std::string_view pool,
                                                      IntArrayRef pool_size, IntArrayRef pool_stride,
                                                      IntArrayRef pool_padding, bool ceil_mode,
                                                      std::string_view algorithm, std::array<bool, 3> wanted) {
  ConvReluPool p =
      problem(x, weight, {stride, padding, dilation, groups, pool, pool_size, pool_stride, pool_padding, ceil_mode});
  const ElementType type = element_type("conv_relu_pool", x);
  const std::array<int64_t, 4> output{p.N, p.G * p.K, p.PH, p.PW};
  const bool by_winograd = algorithm == "winograd" && pool == "none" && groups == 1;
  if (by_winograd) forward(p, algorithm);  // checks
  const bool relu = !by_winograd || index.numel() > 0;
  TORCH_CHECK_VALUE(grad_output.sizes() == IntArrayRef(output) && (!relu || index.sizes() == IntArrayRef(output)),
                    "conv_relu_pool: want grad_output and index ", IntArrayRef(output), ", got ", grad_output.sizes(),
                    " and ", index.sizes(), ", which may be empty for winograd without ReLU, pool and groups");
  TORCH_CHECK_TYPE(grad_output.scalar_type() == x.scalar_type() && index.scalar_type() == at::kByte,
                   "conv_relu_pool: input is ", x.scalar_type(), ", grad_output is ", grad_output.scalar_type(),
                   ", index is ", index.scalar_type());
  const auto [want_x, want_weight, want_bias] = wanted;
  const auto gradient = [&](bool want, IntArrayRef sizes, at::MemoryFormat format) {
    return want ? fresh(sizes, format, x.options()) : at::empty({0}, x.options());
  };
  const Tensor dx = gradient(want_x, x.sizes(), memory_format(x));
  const Tensor dw = gradient(want_weight, weight.sizes(), memory_format(weight));  // autograd would copy it into that
  const Tensor db = gradient(want_bias, {weight.size(0)}, at::MemoryFormat::Contiguous);
  if (grad_output.numel() == 0) return {dx, dw.zero_(), db.zero_()};
  const Tensor dy = by_winograd && relu ? surviving(grad_output, index, memory_format(x)) : grad_output;
  const uint8_t* at = by_winograd ? nullptr : index.const_data_ptr<uint8_t>();
  p.y = strides_of(dy);
  if (!by_winograd) p.index = strides_of(index);

  if (want_weight || want_bias) {
    p.x = strides_of(x);
    const ConvReluPoolBwdWeights& kernels =
        by_winograd ? FASTARCH_SELECT(conv_relu_pool_winograd_bwd_weight) : FASTARCH_SELECT(conv_relu_pool_bwd_weight);
    const ConvReluPoolBwdWeight& kernel = kernels.of[type];
    const Tensor sums = workspace(kernel.sums_bytes(p));
    parallel(kernel.tasks(p), kernel.scratch_bytes(p), operations(p), [&](int64_t task, void* scratch) {
      kernel.run(p, x.const_data_ptr(), dy.const_data_ptr(), at, sums.data_ptr(), task, scratch);
    });
    parallel(p.G * p.K, 0, 16.0 * weight.numel(), [&](int64_t channel, void*) {
      kernel.finish(p, sums.data_ptr(), want_weight ? dw.data_ptr() : nullptr, want_bias ? db.data_ptr() : nullptr,
                    channel);
    });
  }
  if (want_x) {
    p.x = strides_of(dx);
    const Tensor filters = weight.contiguous(memory_format(weight));
    if (by_winograd) {
      const Operands operands{
          dy.const_data_ptr(), filters.const_data_ptr(), nullptr, nullptr, nullptr, dx.data_ptr(), nullptr};
      run(adjoint(p), FASTARCH_SELECT(conv_relu_pool_winograd).of[type], operands, x.element_size(), 0);
      return {dx, dw, db};
    }
    const ConvReluPoolBwdInput& kernel = FASTARCH_SELECT(conv_relu_pool_bwd_input).of[type];
    const Tensor packed = workspace(kernel.packed_bytes(p));
    parallel(kernel.pack_tasks(p), 0, 16.0 * weight.numel(),
             [&](int64_t task, void*) { kernel.pack(p, filters.const_data_ptr(), packed.data_ptr(), task); });
    parallel(kernel.tasks(p), kernel.scratch_bytes(p), operations(p), [&](int64_t task, void* scratch) {
      kernel.run(p, packed.data_ptr(), dy.const_data_ptr(), at, dx.data_ptr(), task, scratch);
    });
  }
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CPU, m) {
  m.impl("conv_relu_pool_fwd", conv_relu_pool_fwd);
  m.impl("conv_relu_pool_bwd", conv_relu_pool_bwd);
}

}  // namespace fastarch
