// Attention on CPUs, the torch side: checks, outputs, tasks, registration.
#include "cpu/attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/tensor.h"

namespace fastarch {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::ScalarType computed_in(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Heads of any strides but the last, which products read as vectors.
Tensor readable(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : t.contiguous(); }

Heads heads_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// As fastarch/ops/attention.py's empty_like_heads: tokens outside heads where t has them so.
Tensor empty_like_heads(const Tensor& t, int64_t width) {
  const int64_t B = t.size(0), H = t.size(1), L = t.size(2);
  if (t.stride(1) < t.stride(2))
    return fresh({B, L, H, width}, at::MemoryFormat::Contiguous, t.options()).transpose(1, 2);
  return fresh({B, H, L, width}, at::MemoryFormat::Contiguous, t.options());
}

// Everything that a call brings, kept alive and laid out for the kernels.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor mask, slopes, ends_q, ends_k, lengths_k;
  Attention p;
};

void check_ends(const char* what, const Tensor& ends, int64_t total) {
  TORCH_CHECK_VALUE(ends.dim() == 1 && ends.scalar_type() == at::kInt && ends.size(0) >= 1 && ends.is_contiguous(),
                    "attention: want ", what, " [sequences + 1] of int32, contiguous, got ", ends.sizes());
  const int32_t* at = ends.const_data_ptr<int32_t>();
  const int64_t n = ends.size(0);
  bool fits = at[0] == 0 && at[n - 1] == total;
  for (int64_t i = 1; i < n; i++) fits = fits && at[i - 1] <= at[i];
  TORCH_CHECK_VALUE(fits, "attention: want ", what, " rising from 0 to ", total);
}

// The public functions in Python explain bad arguments; these checks keep a direct call of the operation in bounds.
Inputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
              const OptionalTensor& slopes, const OptionalTensor& ends_q, const OptionalTensor& ends_k,
              const OptionalTensor& lengths_k, const OptionalTensor& seed, double scale, int64_t window_left,
              int64_t window_right, bool lower_right, double softcap, double dropout, std::string_view algorithm) {
  TORCH_CHECK_VALUE(algorithm == "flash" || algorithm == "split",
                    "attention: want algorithm flash or split on CPUs, got ", algorithm);
  for (const Tensor* t : {&q, &k, &v}) {
    TORCH_CHECK_VALUE(t->dim() == 4, "attention: want q, k and v [B, H, L, D], got ", t->sizes());
    TORCH_CHECK_TYPE(t->scalar_type() == q.scalar_type() && t->device() == q.device(), "attention: q is ",
                     q.scalar_type(), " on ", q.device(), ", another is ", t->scalar_type(), " on ", t->device());
  }
  TORCH_CHECK_VALUE(q.size(0) == k.size(0) && q.size(0) == v.size(0) && k.size(1) == v.size(1) &&
                        k.size(2) == v.size(2) && q.size(3) == k.size(3),
                    "attention: want q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv], got ", q.sizes(), ", ",
                    k.sizes(), ", ", v.sizes());
  TORCH_CHECK_VALUE(q.numel() > 0 && k.numel() > 0 && v.numel() > 0 && q.size(1) % k.size(1) == 0,
                    "attention: want heads of q that are a multiple of those of k, and no empty tensor, got ",
                    q.sizes(), " and ", k.sizes());
  TORCH_CHECK_VALUE(q.size(3) <= 256 && v.size(3) <= 256, "attention: want heads of up to 256 elements, got ",
                    q.size(3), " and ", v.size(3));
  TORCH_CHECK_VALUE(window_left >= -1 && window_right >= -1 && softcap >= 0 && dropout >= 0 && dropout < 1,
                    "attention: want windows >= -1, softcap >= 0 and dropout_p in [0, 1), got ", window_left, ", ",
                    window_right, ", ", softcap, " and ", dropout);
  Inputs in{readable(q), readable(k), readable(v), mask, slopes, ends_q, ends_k, lengths_k, {}};
  Attention& p = in.p;
  p.B = q.size(0), p.H = q.size(1), p.group = q.size(1) / k.size(1);
  p.Lq = q.size(2), p.Lk = k.size(2), p.D = q.size(3), p.Dv = v.size(3);
  p.q = in.q.const_data_ptr(), p.k = in.k.const_data_ptr(), p.v = in.v.const_data_ptr();
  p.q_at = heads_of(in.q), p.k_at = heads_of(in.k), p.v_at = heads_of(in.v);
  p.left = window_left, p.right = window_right, p.lower_right = lower_right;
  p.scale = scale, p.softcap = softcap, p.dropout = dropout;

  if (ends_q || ends_k) {
    TORCH_CHECK_VALUE(ends_q && ends_k && p.B == 1 && !mask && !lengths_k && ends_q->sizes() == ends_k->sizes(),
                      "attention: want packed sequences with both cu_seqlens, B = 1, no mask and no seqlens_k");
    check_ends("cu_seqlens_q", *ends_q, p.Lq), check_ends("cu_seqlens_k", *ends_k, p.Lk);
    p.ends_q = ends_q->const_data_ptr<int32_t>(), p.ends_k = ends_k->const_data_ptr<int32_t>();
  }
  const int64_t sequences = ends_q ? ends_q->size(0) - 1 : p.B;
  if (lengths_k) {
    TORCH_CHECK_VALUE(lengths_k->scalar_type() == at::kInt && lengths_k->is_contiguous() && lengths_k->dim() == 1 &&
                          lengths_k->size(0) == p.B,
                      "attention: want seqlens_k [", p.B, "] of int32, contiguous, got ", lengths_k->sizes());
    p.lengths_k = lengths_k->const_data_ptr<int32_t>();
    for (int64_t b = 0; b < p.B; b++)
      TORCH_CHECK_VALUE(p.lengths_k[b] >= 0 && p.lengths_k[b] <= p.Lk, "attention: want seqlens_k in [0, ", p.Lk, "]");
  }
  if (mask) {
    const bool boolean = mask->scalar_type() == at::kBool, as_input = mask->scalar_type() == q.scalar_type();
    TORCH_CHECK_TYPE(boolean || as_input || mask->scalar_type() == computed_in(q), "attention: want mask of bool, ",
                     computed_in(q), " or ", q.scalar_type(), ", got ", mask->scalar_type());
    TORCH_CHECK_VALUE(mask->dim() == 4, "attention: want mask in 4 dimensions, got ", mask->sizes());
    Tensor t = mask->expand({p.B, p.H, p.Lq, p.Lk});
    if (mask->size(3) > 1 && mask->stride(3) != 1) t = mask->contiguous().expand({p.B, p.H, p.Lq, p.Lk});
    in.mask = t;
    p.mask_type = boolean ? BOOLEAN : as_input ? AS_INPUT : AS_SCORE;
    p.mask = t.const_data_ptr();
    p.mask_b = t.stride(0), p.mask_h = t.stride(1), p.mask_i = t.stride(2), p.mask_j = t.stride(3);
  }
  if (slopes) {
    const bool one = slopes->dim() == 1;
    TORCH_CHECK_VALUE(slopes->scalar_type() == at::kFloat && (one || slopes->dim() == 2) && slopes->size(-1) == p.H &&
                          (one || slopes->size(0) == sequences),
                      "attention: want alibi_slopes [", p.H, "] or [", sequences, ", ", p.H, "] of float32, got ",
                      slopes->sizes());
    in.slopes = slopes->contiguous();
    p.slopes = in.slopes->const_data_ptr<float>(), p.slopes_b = one ? 0 : p.H;
  }
  if (dropout > 0) {
    TORCH_CHECK_VALUE(seed && seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->device() == q.device(),
                      "attention: want seed [1] of int64 for dropout");
    p.seed = uint64_t(*seed->const_data_ptr<int64_t>());
  }
  return in;
}

int64_t sequences_of(const Inputs& in) { return in.ends_q ? in.ends_q->size(0) - 1 : in.p.B; }

// Enough tasks for any number of threads, of shapes alone: results must not depend on threads.
constexpr int64_t TASKS = 32;

// Ranges of queries of all heads: of nearly equal size, `largest` at most.
std::vector<AttentionTask> query_tasks(const Inputs& in, int64_t largest) {
  const Attention& p = in.p;
  const int64_t sequences = sequences_of(in), heads = std::max<int64_t>(sequences * p.H, 1);
  std::vector<AttentionTask> tasks;
  for (int64_t b = 0; b < sequences; b++) {
    const int64_t n = sequence_of(p, b).queries;
    const int64_t wanted = std::min((TASKS + heads - 1) / heads, n / KEY_TILE);
    const int64_t parts = std::max((n + largest - 1) / largest, wanted);
    for (int64_t h = 0; h < p.H; h++) {
      for (int64_t i = 0; i < parts && n > 0; i++) tasks.push_back({b, h, n * i / parts, n * (i + 1) / parts});
    }
  }
  return tasks;
}

double operations(const Attention& p) { return 4.0 * p.B * p.H * p.Lq * p.Lk * (p.D + p.Dv); }

// Ranges of keys of all heads of k, by part: several where there are few heads.
std::vector<AttentionTask> key_tasks(const Inputs& in, int64_t parts) {
  const Attention& p = in.p;
  std::vector<AttentionTask> tasks;
  for (int64_t b = 0; b < sequences_of(in); b++) {
    const int64_t n = sequence_of(p, b).keys, tiles = (n + KEY_TILE - 1) / KEY_TILE;
    for (int64_t h = 0; h < p.H / p.group; h++) {
      for (int64_t i = 0; i < parts; i++)
        tasks.push_back({b, h, tiles * i / parts * KEY_TILE, std::min(tiles * (i + 1) / parts * KEY_TILE, n)});
    }
  }
  return tasks;
}

void attend_to_parts(const Inputs& in, const AttentionSplit& kernel, const Tensor& o, const Tensor& lse) {
  const Attention& p = in.p;
  const int64_t heads = p.B * p.H / p.group, tiles = (p.Lk + KEY_TILE - 1) / KEY_TILE;
  const int64_t parts = std::clamp<int64_t>((TASKS + heads - 1) / heads, 1, tiles);
  const std::vector<AttentionTask> tasks = key_tasks(in, parts);
  const int64_t bytes = kernel.partial_elements(p) * lse.element_size();
  const Tensor partials = workspace(tasks.size() * bytes);
  uint8_t* at = partials.data_ptr<uint8_t>();
  parallel(tasks.size(), kernel.scratch_bytes(p), operations(p),
           [&](int64_t i, void* scratch) { kernel.run(p, tasks[i], at + i * bytes, scratch); });
  parallel(heads, 0, 4.0 * heads * parts * kernel.partial_elements(p), [&](int64_t i, void*) {
    const AttentionTask& first = tasks[i * parts];
    kernel.merge(p, first.b, first.h, at + i * parts * bytes, parts, o.data_ptr(), lse.data_ptr());
  });
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                         const OptionalTensor& alibi_slopes, const OptionalTensor& cu_seqlens_q,
                                         const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k,
                                         const OptionalTensor& seed, int64_t, int64_t, double scale,
                                         int64_t window_left, int64_t window_right, bool lower_right, double softcap,
                                         double dropout_p, std::string_view algorithm) {
  const AttentionFwd& kernel = FASTARCH_SELECT(attention_fwd).of[element_type("attention", q)];
  Inputs in = inputs(q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqlens_k, seed, scale, window_left,
                     window_right, lower_right, softcap, dropout_p, algorithm);
  Attention& p = in.p;
  const Tensor o = empty_like_heads(q, p.Dv), lse = at::empty({p.B, p.H, p.Lq}, q.options().dtype(computed_in(q)));
  p.o_at = heads_of(o);
  if (algorithm == "split") {
    TORCH_CHECK_VALUE(p.dropout == 0 && !p.ends_q, "attention: split keys want no dropout and no packed sequences");
    attend_to_parts(in, FASTARCH_SELECT(attention_split).of[element_type("attention", q)], o, lse);
    return {o, lse};
  }
  const std::vector<AttentionTask> tasks = query_tasks(in, kernel.queries(p));
  parallel(tasks.size(), kernel.scratch_bytes(p), operations(p),
           [&](int64_t i, void* scratch) { kernel.run(p, tasks[i], o.data_ptr(), lse.data_ptr(), scratch); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k, const OptionalTensor& seed,
    const Tensor& output, const Tensor& lse, int64_t, int64_t, double scale, int64_t window_left, int64_t window_right,
    bool lower_right, double softcap, double dropout_p, std::string_view algorithm, std::array<bool, 4> wanted) {
  const AttentionBwd& kernel = FASTARCH_SELECT(attention_bwd).of[element_type("attention", q)];
  Inputs in = inputs(q, k, v, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqlens_k, seed, scale, window_left,
                     window_right, lower_right, softcap, dropout_p, algorithm);
  Attention& p = in.p;
  const auto type = computed_in(q);
  for (const Tensor* t : {&grad_output, &output})
    TORCH_CHECK_VALUE(t->sizes() == at::IntArrayRef({p.B, p.H, p.Lq, p.Dv}) && t->scalar_type() == q.scalar_type() &&
                          t->device() == q.device(),
                      "attention: want grad_output and output as q, of v's width, got ", t->sizes(), " of ",
                      t->scalar_type());
  for (const Tensor* t : {&lse, grad_lse ? &*grad_lse : &lse})
    TORCH_CHECK_VALUE(
        t->sizes() == at::IntArrayRef({p.B, p.H, p.Lq}) && t->scalar_type() == type && t->device() == q.device(),
        "attention: want lse and grad_lse [B, Hq, Lq] of ", type, ", got ", t->sizes(), " of ", t->scalar_type());
  const auto [want_q, want_k, want_v, want_mask] = wanted;
  TORCH_CHECK_VALUE(!want_mask || (mask && p.mask_type != BOOLEAN),
                    "attention: only a mask that is added has a gradient");

  const Tensor o = readable(output), grad_o = readable(grad_output), l = lse.contiguous();
  const OptionalTensor grad_l = grad_lse ? OptionalTensor(grad_lse->contiguous()) : std::nullopt;
  const auto beside = [](bool want, const Tensor& t) {
    return want ? empty_like_heads(t, t.size(3)) : at::empty({0}, t.options());
  };
  const Tensor dq = beside(want_q, q), dk = beside(want_k, k), dv = beside(want_v, v);
  // of every score, and then summed to the mask's shape: in no other order than torch's
  const Tensor ds = want_mask ? at::zeros({p.B, p.H, p.Lq, p.Lk}, q.options().dtype(type)) : Tensor();
  if (p.lengths_k || p.ends_k) dk.zero_(), dv.zero_();  // keys that no sequence has

  const int64_t heads = std::max<int64_t>(sequences_of(in) * p.H / p.group, 1);
  const int64_t parts = std::clamp<int64_t>(8 / heads, 1, (p.Lk + KEY_TILE - 1) / KEY_TILE);
  const int64_t width = kernel.padded(p.D);
  const Tensor delta = at::empty({p.B, p.H, p.Lq}, q.options().dtype(type));
  const Tensor sums = workspace(want_q ? parts * p.B * p.H * p.Lq * width * delta.element_size() : 0);
  p.o_at = heads_of(o);
  const auto data = [](bool want, const Tensor& t) { return want ? t.data_ptr() : nullptr; };
  const auto steps = [](bool want, const Tensor& t) { return want ? heads_of(t) : Heads{}; };
  const AttentionGradients g{o.const_data_ptr(),
                             l.const_data_ptr(),
                             grad_o.const_data_ptr(),
                             grad_l ? grad_l->const_data_ptr() : nullptr,
                             heads_of(grad_o),
                             delta.data_ptr(),
                             sums.data_ptr(),
                             parts,
                             data(want_q, dq),
                             data(want_k, dk),
                             data(want_v, dv),
                             steps(want_q, dq),
                             steps(want_k, dk),
                             steps(want_v, dv),
                             want_mask ? ds.data_ptr() : nullptr};

  const std::vector<AttentionTask> of_queries = query_tasks(in, p.Lq), of_keys = key_tasks(in, parts);
  const double rows = double(p.B) * p.H * p.Lq;
  parallel(of_queries.size(), 0, 2 * rows * p.Dv, [&](int64_t i, void*) { kernel.delta(p, g, of_queries[i]); });
  parallel(of_keys.size(), kernel.scratch_bytes(p), 2.5 * operations(p),
           [&](int64_t i, void* scratch) { kernel.run(p, g, of_keys[i], i % parts, scratch); });
  if (want_q)
    parallel(of_queries.size(), 0, rows * p.D * parts, [&](int64_t i, void*) { kernel.merge(p, g, of_queries[i]); });
  const Tensor dmask = want_mask ? ds.sum_to_size(mask->sizes()).to(mask->scalar_type()) : at::empty({0}, q.options());
  return {dq, dk, dv, dmask};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastarch, CPU, m) {
  m.impl("attention_fwd", attention_fwd);
  m.impl("attention_bwd", attention_bwd);
}

}  // namespace fastarch
