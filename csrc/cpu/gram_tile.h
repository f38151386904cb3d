// Register tiles of a Gram matrix: R x C inner products of rows of one sample at once, vectors along d.
#pragma once

#include "simd.h"

namespace flatkern::cpu::FLATKERN_ISA {

// The widest strip of rows: 5 x 5 sums and their operands take 31 of 32 registers, 3 x 3 take 13 of 16.
constexpr int kTile = FLATKERN_VECTOR_BYTES == 64 ? 5 : 3;

// The sums over the lanes of four vectors, in order.
FLATKERN_INLINE void sum_four(V<double> a, V<double> b, V<double> c, V<double> d, double* out) {
#if FLATKERN_VECTOR_BYTES >= 32
  const V<double> ab = shuffle4<0, 4, 2, 6>(a, b) + shuffle4<1, 5, 3, 7>(a, b);
  const V<double> cd = shuffle4<0, 4, 2, 6>(c, d) + shuffle4<1, 5, 3, 7>(c, d);
  const V<double> all = shuffle4<0, 1, 4, 5>(ab, cd) + shuffle4<2, 3, 6, 7>(ab, cd);
#if FLATKERN_VECTOR_BYTES == 64
  typedef double Half __attribute__((vector_size(32)));
  const Half sum =
      __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
#else
  const V<double> sum = all;
#endif
  __builtin_memcpy(out, &sum, sizeof sum);
#else
  out[0] = a[0] + a[1], out[1] = b[0] + b[1], out[2] = c[0] + c[1], out[3] = d[0] + d[1];
#endif
}

// Rows of one sample as the tiles read them: `full` elements (a multiple of the width) at `data`, and where
// `tail` is set one more vector a row, padded with zeros. `ahead`: how far on the next sample lies
// (prefetch).
struct Rows {
  const double* data;
  std::int64_t stride;
  std::int64_t full;
  const double* tail;
  std::int64_t ahead;
};

template <int R, int C, bool diagonal>
FLATKERN_INLINE void gram_tile(const Rows& x, int i0, int j0, double* g, int ld, bool add) {
  constexpr int width = Simd<double>::width, sums = diagonal ? R * (R + 1) / 2 : R * C;
  constexpr auto at = [](int r, int s) { return diagonal ? r * (r + 1) / 2 + s : r * C + s; };
  V<double> acc[(sums + 3) / 4 * 4] = {};
  const double* a = x.data + i0 * x.stride;
  const double* b = x.data + j0 * x.stride;
  for (std::int64_t k = 0; k < x.full; k += width) {
    V<double> right[C];
#pragma GCC unroll 8
    for (int s = 0; s < C; ++s) {
      right[s] = load<double>(b + s * x.stride + k);
      if (diagonal) __builtin_prefetch(b + s * x.stride + k + x.ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V<double> left = diagonal ? right[r < C ? r : 0] : load<double>(a + r * x.stride + k);
#pragma GCC unroll 8
      for (int s = 0; s < (diagonal ? r + 1 : C); ++s) acc[at(r, s)] += left * right[s];
    }
  }
  if (x.tail) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V<double> left = load<double>(x.tail + (i0 + r) * width);
#pragma GCC unroll 8
      for (int s = 0; s < (diagonal ? r + 1 : C); ++s) {
        acc[at(r, s)] += left * load<double>(x.tail + (j0 + s) * width);
      }
    }
  }
  double total[(sums + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int k = 0; k < sums; k += 4) sum_four(acc[k], acc[k + 1], acc[k + 2], acc[k + 3], total + k);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    double* row = g + (i0 + r) * ld + j0;
#pragma GCC unroll 8
    for (int s = 0; s < (diagonal ? r + 1 : C); ++s)
      row[s] = add ? row[s] + total[at(r, s)] : total[at(r, s)];
  }
}

template <int R>
FLATKERN_INLINE void gram_strip(const Rows& x, int cols, int i0, int j0, double* g, int ld, bool add) {
  switch (cols) {
    case 1:
      return gram_tile<R, 1, false>(x, i0, j0, g, ld, add);
    case 2:
      return gram_tile<R, 2, false>(x, i0, j0, g, ld, add);
    case 3:
      return gram_tile<R, 3, false>(x, i0, j0, g, ld, add);
#if FLATKERN_VECTOR_BYTES == 64
    case 4:
      return gram_tile<R, 4, false>(x, i0, j0, g, ld, add);
    case 5:
      return gram_tile<R, 5, false>(x, i0, j0, g, ld, add);
#endif
  }
}

template <int R>
FLATKERN_INLINE void gram_rows(const Rows& x, int strips, int c, int strip, double* g, int ld, bool add) {
  const int i = c * strip / strips;
  for (int t = 0; t < strip; ++t) {
    const int j = c * t / strips;
    gram_strip<R>(x, c * (t + 1) / strips - j, i, j, g, ld, add);
  }
  gram_tile<R, R, true>(x, i, i, g, ld, add);
}

// The lower triangle of x x^T, in strips of rows as equal as can be: no thin tile is left over at the end.
inline void gram_lower(const Rows& x, int c, double* g, int ld, bool add) {
  const int strips = (c + kTile - 1) / kTile;
  for (int strip = 0; strip < strips; ++strip) {
    switch (c * (strip + 1) / strips - c * strip / strips) {
      case 1:
        gram_rows<1>(x, strips, c, strip, g, ld, add);
        break;
      case 2:
        gram_rows<2>(x, strips, c, strip, g, ld, add);
        break;
      case 3:
        gram_rows<3>(x, strips, c, strip, g, ld, add);
        break;
#if FLATKERN_VECTOR_BYTES == 64
      case 4:
        gram_rows<4>(x, strips, c, strip, g, ld, add);
        break;
      case 5:
        gram_rows<5>(x, strips, c, strip, g, ld, add);
        break;
#endif
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
