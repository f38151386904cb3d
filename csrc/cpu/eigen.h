// Eigenvalues of `width` symmetric positive semidefinite matrices at once, one a lane: Householder reduction
// to tridiagonal form (Martin, Reinsch & Wilkinson 1968), then QL iterations with explicit shifts (Bowdler,
// Martin, Reinsch & Wilkinson 1968). All lanes share the positions worked on; a lane that has converged holds
// still.
#pragma once

#include "batch_spd.h"

namespace flatkern::cpu::FLATKERN_ISA {

constexpr int kMostSweeps = 60;  // an eigenvalue; two are usual

// 2^-e for x of magnitude 2^e, lane by lane: brings numbers of any size near one, exactly.
FLATKERN_INLINE V<double> power_below(V<double> x) {
  typedef typename Simd<double>::I I;
  const I mask = I{} + (0x7ffLL << 52), most = I{} + (2045LL << 52);
  I e = reinterpret_cast<I>(x) & mask;
  e = e > most ? most : e;
  return reinterpret_cast<V<double>>((I{} + (2046LL << 52)) - e);
}

// p = A u for the leading n x n block of the packed lower triangle a, R rows at a time.
template <int R>
FLATKERN_INLINE void symmetric_rows(const V<double>* __restrict a, int j, const V<double>* __restrict u,
                                    V<double>* __restrict p) {
  V<double> sum[R], mine[R];
  const V<double>* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = a + packed(j + r, 0);
    mine[r] = u[j + r];
    sum[r] = V<double>{};
  }
  for (int k = 0; k < j; ++k) {
    const V<double> uk = u[k];
    V<double> pk = p[k];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V<double> v = row[r][k];
      sum[r] += v * uk;
      pk += v * mine[r];
    }
    p[k] = pk;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < r; ++s) {
      sum[r] += row[r][j + s] * mine[s];
      sum[s] += row[r][j + s] * mine[r];
    }
    sum[r] += row[r][j + r] * mine[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) p[j + r] = sum[r];
}

// a -= u q^T + q u^T on the same block, R rows at a time.
template <int R>
FLATKERN_INLINE void update_rows(V<double>* __restrict a, int j, const V<double>* __restrict u,
                                 const V<double>* __restrict q) {
  V<double> uj[R], qj[R];
  V<double>* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = a + packed(j + r, 0);
    uj[r] = u[j + r];
    qj[r] = q[j + r];
  }
  for (int k = 0; k <= j; ++k) {
    const V<double> uk = u[k], qk = q[k];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r][k] -= uj[r] * qk + qj[r] * uk;
  }
#pragma GCC unroll 4
  for (int r = 1; r < R; ++r) {
#pragma GCC unroll 4
    for (int s = 1; s <= r; ++s) row[r][j + s] -= uj[r] * qj[s] + qj[r] * uj[s];
  }
}

// Reduces the packed triangle `a` to diagonal d[0 .. c - 1] and couplings e[0 .. c - 2]. Row i of `a` then
// holds the Householder vector u_i of that step, and h[i] the factor of H_i = I - h_i u_i u_i^T. `p` is room
// for c vectors.
inline void tridiagonalize(V<double>* __restrict a, int c, V<double>* __restrict d, V<double>* __restrict e,
                           V<double>* __restrict h, V<double>* __restrict p) {
  const V<double> zero = {}, one = broadcast(1.0);
  for (int i = c - 1; i > 0; --i) {
    V<double>* u = a + packed(i, 0);
    const int last = i - 1;
    V<double> sum = {};
    for (int k = 0; k < last; ++k) sum += u[k] * u[k];
    const V<double> alpha = u[last], square = sum + alpha * alpha, norm = square_root(square);
    const auto done = sum <= 0.0;
    const V<double> g = done ? alpha : (alpha > 0.0 ? -norm : norm);
    const V<double> factor = done ? zero : one / (done ? one : square - alpha * g);
    e[last] = g;
    h[i] = factor;
    d[i] = u[i];
    u[last] = done ? zero : alpha - g;
    int j = 0;
    for (; j + 4 <= i; j += 4) symmetric_rows<4>(a, j, u, p);
    for (; j < i; ++j) symmetric_rows<1>(a, j, u, p);
    V<double> dot = {};
    for (int k = 0; k < i; ++k) {
      p[k] *= factor;
      dot += p[k] * u[k];
    }
    const V<double> half = dot * factor * 0.5;
    for (int k = 0; k < i; ++k) p[k] -= half * u[k];
    for (j = 0; j + 4 <= i; j += 4) update_rows<4>(a, j, u, p);
    for (; j < i; ++j) update_rows<1>(a, j, u, p);
  }
  if (c > 0) d[0] = a[0];
}

// The product of the Householder reflections, transposed: row j of z (pitch c) is column j of it.
inline void accumulate_reflections(const V<double>* __restrict a, int c, const V<double>* __restrict h,
                                   V<double>* __restrict z) {
  for (int j = 0; j < c * c; ++j) z[j] = V<double>{};
  for (int j = 0; j < c; ++j) z[j * c + j] = broadcast(1.0);
  for (int i = 2; i < c; ++i) {
    const V<double>* u = a + packed(i, 0);
    for (int j = 0; j < i; ++j) {
      V<double>* row = z + j * c;
      V<double> g = {};
      for (int k = 0; k < i; ++k) g += u[k] * row[k];
      g *= h[i];
      for (int k = 0; k < i; ++k) row[k] -= g * u[k];
    }
  }
}

// Rotations (cosine, sine) of rows i and i + 1 of z for i = m - 1 down to l, N columns at a time.
template <int N>
FLATKERN_INLINE void rotate_columns(V<double>* __restrict z, int c, int l, int k,
                                    const V<double>* __restrict cosine, const V<double>* __restrict sine) {
  V<double> carry[N];
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) carry[s] = z[(c - 1) * c + k + s];
  for (int i = c - 2; i >= l; --i) {
    const V<double> co = cosine[i], si = sine[i];
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
      const V<double> upper = z[i * c + k + s];
      z[(i + 1) * c + k + s] = si * upper + co * carry[s];
      carry[s] = co * upper - si * carry[s];
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) z[l * c + k + s] = carry[s];
}

// Diagonalizes in place: d receives the eigenvalues in no order; where `vectors`, the rows of z turn into the
// eigenvectors. `room` is for 2 c vectors. Returns the lanes that did not converge.
template <bool vectors>
typename Simd<double>::I ql(V<double>* __restrict d, V<double>* __restrict e, int c, V<double>* __restrict z,
                            V<double>* __restrict room) {
  typedef typename Simd<double>::I I;
  const V<double> zero = {}, one = broadcast(1.0);
  V<double>* cosine = room;
  V<double>* sine = room + c;
  V<double> norm = {};
  for (int i = 0; i < c; ++i) {
    const V<double> size = absolute<double>(d[i]) + (i + 1 < c ? absolute<double>(e[i]) : zero);
    norm = size > norm ? size : norm;
  }
  const V<double> floor = norm * (Limits<double>::eps / 8);
  I failed = {};
  for (int l = 0; l + 1 < c; ++l) {
    int sweep = 0;
    for (;; ++sweep) {
      const V<double> near = (absolute<double>(d[l]) + absolute<double>(d[l + 1])) * Limits<double>::eps;
      const I active = absolute<double>(e[l]) > (near > floor ? near : floor);
      if (!any(active)) break;
      if (sweep == kMostSweeps) {
        failed |= active;
        break;
      }
      const V<double> coupling = active ? e[l] : one;
      const V<double> g = (d[l + 1] - d[l]) / (coupling * 2.0);
      const V<double> root = square_root(g * g + 1.0);
      const V<double> shift = d[l] - coupling / (g + (g < 0.0 ? -root : root));
      V<double> co = one, si = zero, gamma = d[c - 1] - shift, p = gamma;
      for (int i = c - 2; i >= l; --i) {
        const V<double> b = e[i], r = square_root(p * p + b * b), before = co;
        if (i != c - 2) e[i + 1] = active ? si * r : e[i + 1];
        const auto turns = r > 0.0;
        const V<double> inverse = one / (turns ? r : one);
        co = turns ? p * inverse : one;
        si = b * inverse;
        const V<double> old = gamma, alpha = d[i];
        p = co * (alpha - shift) - si * before * b;
        gamma = co * p;
        d[i + 1] = active ? old + (alpha - gamma) : d[i + 1];
        if (vectors) {
          cosine[i] = active ? co : one;
          sine[i] = active ? si : zero;
        }
      }
      e[l] = active ? si * p : e[l];
      d[l] = active ? shift + gamma : d[l];
      if (vectors) {
        int k = 0;
        for (; k + 4 <= c; k += 4) rotate_columns<4>(z, c, l, k, cosine, sine);
        for (; k < c; ++k) rotate_columns<1>(z, c, l, k, cosine, sine);
      }
    }
  }
  return failed;
}

}  // namespace flatkern::cpu::FLATKERN_ISA
