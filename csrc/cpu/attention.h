// Attention on CPUs: what the torch side and the kernels, which know no torch, agree on.
// The equations stand in fastarch/ref/attention.py and fastarch/ops/attention.py.
#pragma once

#include <stdint.h>

#include "cpu/element_type.h"
#include "cpu/isa.h"

// Where element (b, h, i, e) stands: the steps are in elements, of e 1.
struct Heads {
  int64_t b, h, i;
};

enum MaskType { NO_MASK, BOOLEAN, AS_INPUT, AS_SCORE };  // elements: bool, those of q, those that are computed in

struct Attention {
  int64_t B, H, group;  // sequences; heads of q, of which `group` read one head of k
  int64_t Lq, Lk, D, Dv;
  const void *q, *k, *v;
  Heads q_at, k_at, v_at, o_at;
  MaskType mask_type;
  const void* mask;
  int64_t mask_b, mask_h, mask_i, mask_j;  // steps; of j 1 or 0
  const float* slopes;
  int64_t slopes_b;
  const int32_t *ends_q, *ends_k, *lengths_k;  // packed sequences, or how many keys of Lk there are; nullptr
  int64_t left, right;                         // -1 for no bound
  bool lower_right;
  double scale, softcap, dropout;
  uint64_t seed;
};

// A sequence: the first of its tokens, how many there are, and the diagonal at query i: i + shift.
struct Sequence {
  int64_t b, q, k, queries, keys, shift;

  int64_t memory_b;  // 0 where sequences are packed
};

inline Sequence sequence_of(const Attention& p, int64_t b) {
  Sequence s{b, 0, 0, p.Lq, p.Lk, 0, b};
  if (p.ends_q) {
    s.q = p.ends_q[b], s.queries = p.ends_q[b + 1] - s.q;
    s.k = p.ends_k[b], s.keys = p.ends_k[b + 1] - s.k;
    s.memory_b = 0;
  }
  if (p.lengths_k) s.keys = p.lengths_k[b];
  if (p.lower_right) s.shift = s.keys - s.queries;
  return s;
}

// A range of queries, or of keys, of one head.
struct AttentionTask {
  int64_t b, h, begin, end;
};

// Ranges of keys begin at multiples of it.
constexpr int64_t KEY_TILE = 128;

struct AttentionFwd {
  int64_t (*queries)(const Attention&);  // the most that a task may hold
  int64_t (*scratch_bytes)(const Attention&);
  // o as p.o_at says, lse [B, H, Lq] (of Lq tokens in all, where sequences are packed)
  void (*run)(const Attention&, AttentionTask, void* o, void* lse, void* scratch);
};
struct AttentionFwds {
  AttentionFwd of[ELEMENT_TYPES];
};

// Few queries: parts of the keys of a head of k side by side, for all its queries, and their exact merge.
struct AttentionSplit {
  int64_t (*partial_elements)(const Attention&);  // of one part of one head, in the type computed in
  int64_t (*scratch_bytes)(const Attention&);
  void (*run)(const Attention&, AttentionTask keys, void* partial, void* scratch);
  // o and lse of a head of k, from `parts` partial results
  void (*merge)(const Attention&, int64_t b, int64_t h, void* partials, int64_t parts, void* o, void* lse);
};
struct AttentionSplits {
  AttentionSplit of[ELEMENT_TYPES];
};

struct AttentionGradients {
  const void *o, *lse, *grad_o, *grad_lse;  // lse and grad_lse [B, H, Lq]; grad_lse may be nullptr
  Heads grad_o_at;
  void *delta, *sums_q;  // [B, H, Lq], and parts of dq [parts, B, H, Lq, padded(D)], in the type computed in
  int64_t parts;
  void *dq, *dk, *dv;  // nullptr where unwanted
  Heads dq_at, dk_at, dv_at;
  void* dmask;  // ds [B, H, Lq, Lk], 0 before; or nullptr
};

struct AttentionBwd {
  int64_t (*scratch_bytes)(const Attention&);
  int64_t (*padded)(int64_t D);
  // delta of a range of queries
  void (*delta)(const Attention&, const AttentionGradients&, AttentionTask);
  // dk and dv of a range of keys of a head of k, and what these add to dq, as part `part` of it
  void (*run)(const Attention&, const AttentionGradients&, AttentionTask, int64_t part, void* scratch);
  // dq of a range of queries: the sum of its parts
  void (*merge)(const Attention&, const AttentionGradients&, AttentionTask);
};
struct AttentionBwds {
  AttentionBwd of[ELEMENT_TYPES];
};

FASTARCH_DECLARE(AttentionFwds, attention_fwd);
FASTARCH_DECLARE(AttentionSplits, attention_split);
FASTARCH_DECLARE(AttentionBwds, attention_bwd);
