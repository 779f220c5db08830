// The CPU kernels without torch: each forward and backward on drawn numbers, in every element type, what they computed
// on stdout, a number a line. check_aarch64.py compares what two machines print.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/attention.h"
#include "cpu/batch_norm.h"
#include "cpu/conv_relu_pool.h"
#include "cpu/gru.h"
#include "cpu/storage.h"

namespace {

template <class T>
using Numbers = std::vector<T>;

// From -1 to 1, the same on every machine.
template <class T>
Numbers<T> draw(int64_t n) {
  static uint32_t state = 1;
  Numbers<T> numbers(n);
  for (T& x : numbers) {
    state = state * 1664525 + 1013904223;
    x = Convert<T, Compute<T>>::from(Compute<T>(double(state >> 8) / (1 << 23) - 1));
  }
  return numbers;
}

template <class T>
void show(const char* type, const char* what, const Numbers<T>& numbers) {
  for (T x : numbers) printf("%s %s %.9g\n", type, what, double(Convert<Compute<T>, T>::from(x)));
}

struct Memory {
  explicit Memory(int64_t bytes) : at(aligned_alloc(64, (bytes / 64 + 1) * 64)) {}
  Memory(const Memory&) = delete;
  ~Memory() { free(at); }
  void* const at;
};

template <class T>
void conv_relu_pool(ElementType type, const char* name) {
  ConvReluPool p{};
  p.N = 2, p.G = 1, p.C = 5, p.H = 11, p.W = 13, p.K = 7, p.R = 3, p.S = 3;
  p.OH = p.H, p.OW = p.W, p.PH = p.OH / 2, p.PW = p.OW / 2;
  p.stride_h = p.stride_w = p.padding_h = p.padding_w = p.dilation_h = p.dilation_w = 1;
  p.pool_h = p.pool_w = p.pool_stride_h = p.pool_stride_w = 2;
  p.x = {p.C * p.H * p.W, p.H * p.W, p.W, 1}, p.y = p.index = {p.K * p.PH * p.PW, p.PH * p.PW, p.PW, 1};
  p.threads = 1, p.relu = true;
  const auto x = draw<T>(p.N * p.x.n), w = draw<T>(p.K * p.C * 9), b = draw<T>(p.K), dy = draw<T>(p.N * p.y.n);
  std::vector<uint8_t> index(p.N * p.y.n);
  const struct {
    const char* name;
    const ConvReluPoolFwd& kernel;
  } algorithms[] = {{"polyphase", conv_relu_pool_polyphase_generic.of[type]},
                    {"winograd", conv_relu_pool_winograd_generic.of[type]},
                    {"direct", conv_relu_pool_direct_generic.of[type]}};
  for (const auto& [algorithm, kernel] : algorithms) {
    Numbers<T> y(p.N * p.y.n);
    const Memory packed(kernel.packed_bytes(p)), scratch(kernel.scratch_bytes(p));
    for (int64_t i = 0; i < kernel.pack_tasks(p); i++) kernel.pack(p, w.data(), nullptr, b.data(), packed.at, i);
    for (int64_t i = 0; i < kernel.tasks(p); i++)
      kernel.run(p, x.data(), packed.at, nullptr, y.data(), index.data(), i, scratch.at);
    show(name, algorithm, y);
  }
  const auto gradients = [&](const ConvReluPool& p, const ConvReluPoolBwdWeight& kernel, const Numbers<T>& dy,
                             const char* of_weight, const char* of_bias) {
    Numbers<T> dw(w.size()), db(p.K);
    const Memory sums(kernel.sums_bytes(p)), scratch(kernel.scratch_bytes(p));
    for (int64_t i = 0; i < kernel.tasks(p); i++)
      kernel.run(p, x.data(), dy.data(), index.data(), sums.at, i, scratch.at);
    for (int64_t i = 0; i < p.K; i++) kernel.finish(p, sums.at, dw.data(), db.data(), i);
    show(name, of_weight, dw), show(name, of_bias, db);
  };
  gradients(p, conv_relu_pool_bwd_weight_generic.of[type], dy, "conv_dw", "conv_db");
  {
    ConvReluPool q = p;
    q.relu = false, q.PH = q.OH, q.PW = q.OW, q.pool_h = q.pool_w = q.pool_stride_h = q.pool_stride_w = 1;
    q.y = {q.K * q.OH * q.OW, q.OH * q.OW, q.OW, 1};
    const auto unpooled_dy = draw<T>(q.N * q.y.n);
    gradients(q, conv_relu_pool_winograd_bwd_weight_generic.of[type], unpooled_dy, "winograd_dw", "winograd_db");
  }
  const ConvReluPoolBwdInput& kernel = conv_relu_pool_bwd_input_generic.of[type];
  Numbers<T> dx(x.size());
  const Memory packed(kernel.packed_bytes(p)), scratch(kernel.scratch_bytes(p));
  for (int64_t i = 0; i < kernel.pack_tasks(p); i++) kernel.pack(p, w.data(), packed.at, i);
  for (int64_t i = 0; i < kernel.tasks(p); i++)
    kernel.run(p, packed.at, dy.data(), index.data(), dx.data(), i, scratch.at);
  show(name, "conv_dx", dx);
}

template <class T>
void batch_norm(ElementType type, const char* name, bool rows) {
  using C = Compute<T>;
  BatchNorm p{rows ? 51 : 3, 5, rows ? 1 : 17, rows, true, 1e-3, true};
  const int64_t n = p.N * p.C * p.S;
  const auto x = draw<T>(n), dy = draw<T>(n);
  const auto weight = draw<C>(p.C), bias = draw<C>(p.C);
  Numbers<C> mean(p.C), var(p.C), dweight(p.C), dbias(p.C);
  Numbers<T> y(n), dx(n);
  Numbers<double> sums(2 * p.C);
  const Range all_n{0, p.N}, all_c{0, p.C};
  const Affine affine{weight.data(), bias.data()};

  const BatchNormFwd& fwd = batch_norm_fwd_generic.of[type];
  const Memory fwd_scratch(fwd.scratch_bytes(p)), fwd_constants(fwd.constants_bytes(p));
  fwd.moments(p, x.data(), all_n, all_c, sums.data(), fwd_scratch.at);
  fwd.statistics(p, sums.data(), 1, all_c, mean.data(), var.data());
  fwd.constants(p, affine, mean.data(), var.data(), all_c, fwd_constants.at);
  fwd.apply(p, x.data(), nullptr, fwd_constants.at, y.data(), nullptr, all_n, all_c);
  show(name, "mean", mean), show(name, "var", var), show(name, "norm", y);

  const BatchNormBwd& bwd = batch_norm_bwd_generic.of[type];
  const Memory scratch(bwd.scratch_bytes(p)), constants(bwd.constants_bytes(p));
  bwd.constants(p, affine, mean.data(), var.data(), all_c, constants.at);
  bwd.sums(p, dy.data(), x.data(), nullptr, constants.at, all_n, all_c, sums.data(), scratch.at);
  bwd.gradients(p, var.data(), sums.data(), 1, all_c, constants.at, dweight.data(), dbias.data());
  bwd.apply(p, dy.data(), x.data(), nullptr, constants.at, dx.data(), nullptr, all_n, all_c);
  show(name, "norm_dx", dx), show(name, "norm_dw", dweight), show(name, "norm_db", dbias);
}

template <class T>
void gru(ElementType type, const char* name, int64_t length, int64_t N, bool reset_after) {
  const Gru p{length, N, 5, 19, false, reset_after, nullptr};
  const Team alone{0, 1, 1, Split::ROWS, nullptr};
  const int64_t H = p.H, steps = p.T * p.N;
  const auto x = draw<T>(steps * p.C), h0 = draw<T>(p.N * H), dy = draw<T>(steps * H);
  const auto w_ih = draw<T>(3 * H * p.C), w_hh = draw<T>(3 * H * H), b_ih = draw<T>(3 * H), b_hh = draw<T>(3 * H);
  Numbers<T> output(steps * H), h_n(p.N * H), gates(steps * H * (reset_after ? 4 : 3));
  const GruFwdKernel& fwd = gru_fwd_generic.of[type];
  const Memory memory(fwd.memory_bytes(p, alone));
  fwd.run(p,
          {x.data(), h0.data(), w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data(), output.data(), h_n.data(),
           gates.data()},
          alone, memory.at);
  show(name, "gru", output);

  const GruBwdKernel& bwd = gru_bwd_generic.of[type];
  Numbers<T> dx(x.size()), dh0(h0.size()), dw_ih(w_ih.size()), dw_hh(w_hh.size()), db_ih(3 * H), db_hh(3 * H);
  const Memory more(bwd.memory_bytes(p, alone));
  bwd.run(p,
          {dy.data(), nullptr, x.data(), h0.data(), w_ih.data(), w_hh.data(), output.data(), gates.data(), dx.data(),
           dh0.data(), dw_ih.data(), dw_hh.data(), db_ih.data(), db_hh.data()},
          alone, more.at);
  show(name, "gru_dx", dx), show(name, "gru_dh0", dh0), show(name, "gru_dw_ih", dw_ih);
  show(name, "gru_dw_hh", dw_hh), show(name, "gru_db_ih", db_ih), show(name, "gru_db_hh", db_hh);
}

template <class T>
void attention(ElementType type, const char* name) {
  using C = Compute<T>;
  constexpr int64_t Lq = 21, Lk = 37, D = 10;
  const auto q = draw<T>(Lq * D), k = draw<T>(Lk * D), v = draw<T>(Lk * D), grad_o = draw<T>(Lq * D);
  Attention p{};
  p.B = p.H = p.group = 1, p.Lq = Lq, p.Lk = Lk, p.D = p.Dv = D;
  p.q = q.data(), p.k = k.data(), p.v = v.data();
  const Heads at{0, 0, D};
  p.q_at = p.k_at = p.v_at = p.o_at = at;
  p.left = -1, p.right = 0, p.lower_right = true, p.scale = 0.3, p.softcap = 2, p.dropout = 0.25, p.seed = 7;
  Numbers<T> o(Lq * D), dq(Lq * D), dk(Lk * D), dv(Lk * D);
  Numbers<C> lse(Lq), delta(Lq);

  const AttentionFwd& fwd = attention_fwd_generic.of[type];
  const Memory scratch(fwd.scratch_bytes(p));
  const int64_t most = fwd.queries(p);
  for (int64_t i = 0; i < Lq; i += most)
    fwd.run(p, {0, 0, i, i + most < Lq ? i + most : Lq}, o.data(), lse.data(), scratch.at);
  show(name, "attention", o), show(name, "lse", lse);

  const AttentionBwd& bwd = attention_bwd_generic.of[type];
  const Memory sums(Lq * bwd.padded(D) * sizeof(C)), more(bwd.scratch_bytes(p));
  const AttentionGradients g{o.data(),  lse.data(), grad_o.data(), nullptr, at, delta.data(), sums.at, 1,
                             dq.data(), dk.data(),  dv.data(),     at,      at, at,           nullptr};
  bwd.delta(p, g, {0, 0, 0, Lq});
  bwd.run(p, g, {0, 0, 0, Lk}, 0, more.at);
  bwd.merge(p, g, {0, 0, 0, Lq});
  show(name, "dq", dq), show(name, "dk", dk), show(name, "dv", dv);

  p.dropout = 0;
  const AttentionSplit& split = attention_split_generic.of[type];
  Numbers<C> partial(split.partial_elements(p));
  const Memory last(split.scratch_bytes(p));
  split.run(p, {0, 0, 0, Lk}, partial.data(), last.at);
  split.merge(p, 0, 0, partial.data(), 1, o.data(), lse.data());
  show(name, "split", o);
}

template <class T>
void all(ElementType type, const char* name) {
  conv_relu_pool<T>(type, name);
  batch_norm<T>(type, name, true), batch_norm<T>(type, name, false);
  for (const bool reset_after : {true, false}) {
    gru<T>(type, name, 4, 3, reset_after);
    gru<T>(type, name, 1, 3, reset_after), gru<T>(type, name, 1, 9, reset_after);  // one step packs no weights
  }
  attention<T>(type, name);
}

}  // namespace

int main() {
  all<float>(FLOAT32, "float32");
  all<double>(FLOAT64, "float64");
  all<BFloat16>(BFLOAT16, "bfloat16");
  all<Float16>(FLOAT16, "float16");
}
