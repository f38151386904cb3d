// Attention entry by entry, for query i and key j of a batch entry, as flatkern/kernels/_attention_blocks.py
// has it: the score s, the weight p, and what the derivatives make of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "matrices.h"

namespace flatkern {

constexpr std::int64_t kAttentionWidth = 128;  // the largest head

// A batch entry, and where its mask begins.
struct AttentionPlace {
  std::int64_t b, mask;
};

// Operands are contiguous: [batch, length, width] but for the masks and the row statistics. Null: not there.
template <typename T>
struct Attention {
  std::int64_t batch = 0, queries = 0, keys = 0;
  int width = 0, value_width = 0;
  T scale = 1;
  bool causal = false;
  const T *q = nullptr, *k = nullptr, *v = nullptr;

  // A mask [masks, mask_rows, mask_cols], the last two 1 or all; `places` says which one a batch entry has.
  const T* additive = nullptr;
  const bool* allowed = nullptr;
  std::int64_t masks = 0, mask_rows = 1, mask_cols = 1;
  Batch places;

  const T *g = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr, *dmask = nullptr, *dg = nullptr;
  const T* stats =
      nullptr;  // [batch, queries, 2]: the row maximum (of scores times `factor`) and 1 / row sum
  const T* total = nullptr;   // [batch, queries]: rowsum(g o O)
  const T* mean = nullptr;    // [batch, queries]: rowsum(P o S.)
  const T* change = nullptr;  // [batch, queries]: rowsum(g o O. + g. o O)

  // Base 2 is quicker, but an additive mask may hold the least number there is, which must not overflow.
  FLATKERN_HD T factor() const { return additive ? scale : scale * log2_e(); }
  FLATKERN_HD T exponential(T s) const { return exp2(additive ? s * log2_e() : s); }
  static FLATKERN_HD T log2_e() { return static_cast<T>(1.4426950408889634074); }
  static FLATKERN_HD T exp2(T x) {
#ifdef __CUDA_ARCH__
    return ::exp2(x);
#else
    return std::exp2(x);
#endif
  }

  FLATKERN_HD bool inside(std::int64_t i, std::int64_t j) const {
    return i < queries && j < keys && !(causal && j > i);
  }
  FLATKERN_HD AttentionPlace place(std::int64_t b) const {
    return {b, places.offset(b) * mask_rows * mask_cols};
  }
  FLATKERN_HD std::int64_t mask_at(const AttentionPlace& at, std::int64_t i, std::int64_t j) const {
    return at.mask + (mask_rows > 1 ? i * mask_cols : 0) + (mask_cols > 1 ? j : 0);
  }
};

// The score of an entry from q_i . k_j; -inf where query i does not see key j.
template <typename T>
FLATKERN_HD T attention_score(const Attention<T>& a, const AttentionPlace& at, std::int64_t i, std::int64_t j,
                              T product) {
  if (!a.inside(i, j) || (a.allowed && !a.allowed[a.mask_at(at, i, j)])) return -static_cast<T>(INFINITY);
  return product * a.factor() + (a.additive ? a.additive[a.mask_at(at, i, j)] : T(0));
}

template <typename T>
struct AttentionEntry {
  T p, p_dot, ds, ds_dot;
};

// What the derivatives take from an entry: `products` are q.k, q. k + q k., g.v, g v. + g. v.
// p_dot and ds_dot with `twice` only; ds needs `total`.
template <bool twice, typename T>
FLATKERN_HD AttentionEntry<T> attention_entry(const Attention<T>& a, const AttentionPlace& at, std::int64_t i,
                                              std::int64_t j, const T (&products)[4]) {
  AttentionEntry<T> out = {T(0), T(0), T(0), T(0)};
  if (!a.inside(i, j)) return out;
  const std::int64_t row = at.b * a.queries + i;
  const T score = attention_score(a, at, i, j, products[0]);
  out.p = a.exponential(score - a.stats[2 * row]) * a.stats[2 * row + 1];
  const T e = products[2] - a.total[row];
  out.ds = out.p * e;
  if (twice) {
    const T s_dot = a.scale * products[1] + (a.dmask ? a.dmask[a.mask_at(at, i, j)] : T(0));
    out.p_dot = out.p * (s_dot - a.mean[row]);
    out.ds_dot = out.p_dot * e + out.p * (products[3] - a.change[row]);
  }
  return out;
}

// p and p s., of which the tangent of the output is made.
template <typename T>
FLATKERN_HD void attention_tangent_entry(const Attention<T>& a, const AttentionPlace& at, std::int64_t i,
                                         std::int64_t j, T product, T product_dot, T* p, T* changed) {
  *p = *changed = T(0);
  if (!a.inside(i, j)) return;
  const std::int64_t row = at.b * a.queries + i;
  *p = a.exponential(attention_score(a, at, i, j, product) - a.stats[2 * row]) * a.stats[2 * row + 1];
  *changed = *p * (a.scale * product_dot + (a.dmask ? a.dmask[a.mask_at(at, i, j)] : T(0)));
}

}  // namespace flatkern
