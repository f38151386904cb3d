// L D L^T of `width` symmetric positive definite matrices at once, one a lane.
// The lower triangle lies packed by rows, one vector an element. Afterwards element (i, j) holds
// u_ij = l_ij d_j below the diagonal and d_i on it.
#pragma once

#include "simd.h"

namespace flatkern::cpu::FLATKERN_ISA {

// Bookkeeping of the pivots: which samples are still good, the sum of the logarithms, the reciprocals.
template <typename T>
struct Pivots {
  using I = typename Simd<T>::I;
  LogSum<T> log;
  I good = I{} - 1;
  T tolerance;

  explicit FLATKERN_INLINE Pivots(T tol) : tolerance(tol) {}

  // The reciprocal of the pivot, or 0 where it is no good: the elimination then leaves that variable out and
  // stays finite. Comparisons are false for NaN, so a NaN pivot is no good either.
  FLATKERN_INLINE V<T> take(V<T> pivot, V<T> diagonal) {
    const I ok = (pivot > diagonal * tolerance) & (pivot >= Limits<T>::min_normal);
    const V<T> one = broadcast(T(1));
    const V<T> d = ok ? pivot : one;
    log.add(d);
    good &= ok;
    return ok ? one / d : V<T>{};
  }
};

// All of it in registers (or next to them): the loops unroll completely.
template <typename T, int C>
FLATKERN_INLINE void ldl_small(V<T>* __restrict a, V<T>* __restrict inverse, Pivots<T>& pivots) {
  V<T> x[C * (C + 1) / 2], diagonal[C];
#pragma GCC unroll 64
  for (int k = 0; k < C * (C + 1) / 2; ++k) x[k] = a[k];
#pragma GCC unroll 8
  for (int k = 0; k < C; ++k) diagonal[k] = x[packed(k, k)];
#pragma GCC unroll 8
  for (int k = 0; k < C; ++k) {
    const V<T> inv = pivots.take(x[packed(k, k)], diagonal[k]);
    if (inverse) inverse[k] = inv;
#pragma GCC unroll 8
    for (int j = k + 1; j < C; ++j) {
      const V<T> l = x[packed(j, k)] * inv;
#pragma GCC unroll 8
      for (int i = j; i < C; ++i) x[packed(i, j)] -= x[packed(i, k)] * l;
    }
  }
  if (inverse) {
#pragma GCC unroll 64
    for (int k = 0; k < C * (C + 1) / 2; ++k) a[k] = x[k];
  }
}

// Rows i0 .. i0 + R - 1 below the panel of columns j0 .. j0 + N - 1: subtract what the columns before j0
// contribute, then what the panel's own earlier columns do. `scaled` holds the panel's rows of L.
template <typename T, int R, int N>
FLATKERN_INLINE void ldl_strip(V<T>* __restrict a, int i0, int j0, int c, const V<T>* __restrict scaled) {
  V<T> acc[R][N];
  V<T>* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = a + packed(i0 + r, 0);
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) acc[r][s] = row[r][j0 + s];
  }
  for (int k = 0; k < j0; ++k) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V<T> u = row[r][k];
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) acc[r][s] -= u * scaled[s * c + k];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
#pragma GCC unroll 4
      for (int t = 0; t < s; ++t) acc[r][s] -= acc[r][t] * scaled[s * c + j0 + t];
      row[r][j0 + s] = acc[r][s];
    }
  }
}

template <typename T, int N>
FLATKERN_INLINE void ldl_panel(V<T>* __restrict a, int j0, int c, V<T>* __restrict inverse,
                               V<T>* __restrict scaled, Pivots<T>& pivots) {
  V<T> acc[N][N], diagonal[N];
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) {
    V<T>* row = a + packed(j0 + s, 0);
    for (int k = 0; k < j0; ++k) scaled[s * c + k] = row[k] * inverse[k];
    diagonal[s] = row[j0 + s];
#pragma GCC unroll 4
    for (int t = 0; t <= s; ++t) acc[s][t] = row[j0 + t];
  }
  for (int k = 0; k < j0; ++k) {
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
      const V<T> u = a[packed(j0 + s, 0) + k];
#pragma GCC unroll 4
      for (int t = 0; t <= s; ++t) acc[s][t] -= u * scaled[t * c + k];
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    const V<T> inv = pivots.take(acc[t][t], diagonal[t]);
    inverse[j0 + t] = inv;
#pragma GCC unroll 4
    for (int s = t + 1; s < N; ++s) {
      const V<T> l = acc[s][t] * inv;
      scaled[s * c + j0 + t] = l;
#pragma GCC unroll 4
      for (int r = s; r < N; ++r) acc[r][s] -= acc[r][t] * l;
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) {
#pragma GCC unroll 4
    for (int t = 0; t <= s; ++t) a[packed(j0 + s, j0 + t)] = acc[s][t];
  }
  int i = j0 + N;
  for (; i + 4 <= c; i += 4) ldl_strip<T, 4, N>(a, i, j0, c, scaled);
  if (i + 2 <= c) {
    ldl_strip<T, 2, N>(a, i, j0, c, scaled);
    i += 2;
  }
  if (i < c) ldl_strip<T, 1, N>(a, i, j0, c, scaled);
}

// Columns in panels as wide as the register file allows with strips of four rows.
template <typename T>
void ldl_blocked(V<T>* __restrict a, int c, V<T>* __restrict inverse, V<T>* __restrict scaled,
                 Pivots<T>& pivots) {
  constexpr int N = FLATKERN_VECTOR_BYTES == 64 ? 4 : 2;
  int j = 0;
  for (; j + N <= c; j += N) ldl_panel<T, N>(a, j, c, inverse, scaled, pivots);
  if constexpr (N == 4) {
    if (j + 2 <= c) {
      ldl_panel<T, 2>(a, j, c, inverse, scaled, pivots);
      j += 2;
    }
  }
  if (j < c) ldl_panel<T, 1>(a, j, c, inverse, scaled, pivots);
}

// `inverse` receives the reciprocal pivots and may be null for c <= 8, where the factor is then not written
// back; `scaled` is room for 4 c vectors.
template <typename T>
FLATKERN_INLINE void ldl(V<T>* __restrict a, int c, V<T>* __restrict inverse, V<T>* __restrict scaled,
                         Pivots<T>& pivots) {
  switch (c) {
    case 1:
      return ldl_small<T, 1>(a, inverse, pivots);
    case 2:
      return ldl_small<T, 2>(a, inverse, pivots);
    case 3:
      return ldl_small<T, 3>(a, inverse, pivots);
    case 4:
      return ldl_small<T, 4>(a, inverse, pivots);
    case 5:
      return ldl_small<T, 5>(a, inverse, pivots);
    case 6:
      return ldl_small<T, 6>(a, inverse, pivots);
    case 7:
      return ldl_small<T, 7>(a, inverse, pivots);
    case 8:
      return ldl_small<T, 8>(a, inverse, pivots);
    default:
      return ldl_blocked<T>(a, c, inverse, scaled, pivots);
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
