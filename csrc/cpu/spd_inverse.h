// The inverse of `width` symmetric positive definite matrices at once, from their factors L D L^T.
#pragma once

#include "ldl.h"

namespace flatkern::cpu::FLATKERN_ISA {

// Columns of a register block; the working squares have rows of a multiple of it.
constexpr int kInverseBlock = FLATKERN_VECTOR_BYTES == 64 ? 4 : 2;

FLATKERN_INLINE int inverse_pitch(int c) {
  return (c + 3) / 4 * 4;
}

FLATKERN_INLINE std::int64_t inverse_vectors(int c) {
  return static_cast<std::int64_t>(c) * inverse_pitch(c);
}

// Rows i0 .. i0 + R - 1 of the inverse of the unit triangle L, where the rows above are known. Row i of `m`
// holds zeros beyond its diagonal.
template <typename T, int R>
FLATKERN_INLINE void invert_rows(const V<T>* __restrict a, int i0, V<T>* __restrict m, int pitch) {
  constexpr int N = kInverseBlock;
  for (int j0 = 0; j0 < i0 + R; j0 += N) {
    V<T> acc[R][N] = {};
    for (int k = j0; k < i0; ++k) {
      V<T> right[N];
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) right[s] = m[k * pitch + j0 + s];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V<T> l = a[packed(i0 + r, k)];
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) acc[r][s] -= l * right[s];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) {
        if (i0 + r == j0 + s) acc[r][s] = broadcast(T(1));
      }
#pragma GCC unroll 4
      for (int t = 0; t < r; ++t) {
        const V<T> l = a[packed(i0 + r, i0 + t)];
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) acc[r][s] -= l * acc[t][s];
      }
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) m[(i0 + r) * pitch + j0 + s] = acc[r][s];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = (i0 + R + N - 1) / N * N; j < pitch; ++j) m[(i0 + r) * pitch + j] = V<T>{};
  }
}

// Entries 0 .. count - 1 of every sample, side by side.
template <typename T, int count>
FLATKERN_INLINE void store_entries(T* const* to, const V<T>* entries) {
  constexpr int tile = Simd<T>::tile, whole = count / tile * tile, width = Simd<T>::width;
#pragma GCC unroll 8
  for (int e = 0; e < whole; e += tile) store_tile<T>(to, e, entries + e, width);
#pragma GCC unroll 4
  for (int e = whole; e < count; ++e) store_element<T>(to, e, entries[e], width);
}

// store_inverse for C rows, in registers: M the inverse of the unit triangle, the sum of m_k' m_k / d_k over
// its rows.
template <typename T, int C>
FLATKERN_INLINE void store_inverse_small(const V<T>* __restrict a, const V<T>* __restrict inverse,
                                         typename Simd<T>::I usable, V<T> scale, T* const* to) {
  V<T> m[C][C], out[C * C];
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < i; ++j) {
      V<T> sum = a[packed(i, j)] * inverse[j];
#pragma GCC unroll 4
      for (int k = j + 1; k < i; ++k) sum += a[packed(i, k)] * inverse[k] * m[k][j];
      m[i][j] = -sum;
    }
    m[i][i] = broadcast(T(1));
  }
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j <= i; ++j) {
      V<T> sum = {};
#pragma GCC unroll 4
      for (int k = i; k < C; ++k) sum += m[k][i] * inverse[k] * m[k][j];
      out[i * C + j] = out[j * C + i] = (usable ? sum : V<T>{}) * scale;
    }
  }
  store_entries<T, C * C>(to, out);
}

// The inverse times `scale`, both triangles, to to[0 .. width - 1], c x c each; it counts as zero for the
// samples not in `usable`. Lanes left over point to a sample that has the same values in another lane. `a` is
// a factor as ldl leaves it and is spoiled, `inverse` the reciprocal pivots, `m` room for inverse_vectors(c).
template <typename T>
void store_inverse(V<T>* __restrict a, int c, const V<T>* __restrict inverse, typename Simd<T>::I usable,
                   V<T> scale, V<T>* __restrict m, T* const* to) {
  switch (c) {
    case 1:
      return store_inverse_small<T, 1>(a, inverse, usable, scale, to);
    case 2:
      return store_inverse_small<T, 2>(a, inverse, usable, scale, to);
    case 3:
      return store_inverse_small<T, 3>(a, inverse, usable, scale, to);
    case 4:
      return store_inverse_small<T, 4>(a, inverse, usable, scale, to);
    default:
      break;
  }
  constexpr int N = kInverseBlock, tile = Simd<T>::tile, lanes = Simd<T>::width;
  const int pitch = inverse_pitch(c);
  for (int i = 0; i < c; ++i) {
    V<T>* row = a + packed(i, 0);
    for (int k = 0; k < i; ++k) row[k] *= inverse[k];
  }
  // the last block of rows moves back inside the matrix: the rows that overlap come out the same again
  for (int i = 0; i < c; i += N) invert_rows<T, N>(a, i + N <= c ? i : c - N, m, pitch);
  for (int i = 0; i < c; ++i) {
    const V<T> root = square_root(inverse[i]);
    V<T>* row = m + i * pitch;
    for (int k = 0; k < pitch; ++k) row[k] = usable ? row[k] * root : V<T>{};
  }
  // blocks of m^T m on and below the diagonal, which move back alike
  for (int start = 0; start < c; start += 4) {
    const int i0 = start + 4 <= c ? start : c - 4;
    for (int at = 0; at < start + 4 && at < c; at += N) {
      const int j0 = at + N <= c ? at : c - N;
      V<T> acc[4][N] = {};
      for (int k = i0 < j0 ? j0 : i0; k < c; ++k) {
        const V<T>* row = m + k * pitch;
        V<T> right[N];
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) right[s] = row[j0 + s];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const V<T> left = row[i0 + r];
#pragma GCC unroll 4
          for (int s = 0; s < N; ++s) acc[r][s] += left * right[s];
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) acc[r][s] *= scale;
      }
      if constexpr (N % tile == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
          for (int s = 0; s < N; s += tile) store_tile<T>(to, (i0 + r) * c + j0 + s, acc[r] + s, lanes);
        }
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
          for (int s = 0; s < N; ++s) store_element<T>(to, (i0 + r) * c + j0 + s, acc[r][s], lanes);
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; r += tile) {
          V<T> column[tile];
#pragma GCC unroll 4
          for (int t = 0; t < tile; ++t) column[t] = acc[r + t][s];
          store_tile<T>(to, (j0 + s) * c + i0 + r, column, lanes);
        }
      }
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
