// The statistics of Gram matrices, what their derivatives need, and the derivative itself.
#pragma once

#include "batch_gram.h"
#include "lq.h"

namespace flatkern::cpu::FLATKERN_ISA {

// Replaces the statistics of one sample, whose Gram matrix has lost the digits, by those of its rows' factor
// L: `diagonal` is that of the Gram matrix, `room` holds c lq_pitch(c, d) + 2 c c values.
template <typename T>
FLATKERN_INLINE void stats_of_rows(const Matrices<T>& x, std::int64_t n, const double* diagonal,
                                   std::int64_t stride, double* room, const GramStatsOut& out) {
  const std::int64_t c = x.rows;
  double* l = room + c * lq_pitch(c, x.cols);
  lq_sample<T>(x.sample(n), x, room, l);
  const double tolerance = lq_tolerance<T>(c);
  double mantissas = 1, ratio = 1;
  std::int64_t bad = 0, exponents = 0;
  for (std::int64_t k = 0; k < c; ++k) {
    const double pivot = l[k * c + k] * l[k * c + k], whole = diagonal[k * stride];
    if (!good_pivot(pivot, whole, tolerance)) ++bad;
    const double part = whole > 0 ? pivot / whole : 0;
    ratio = part < ratio ? part : ratio;
    int exponent = 0;
    mantissas = __builtin_frexp(mantissas * l[k * c + k], &exponent);
    exponents += exponent;
  }
  const double log_two = 0.69314718055994530942;
  if (bad < c - x.cols) bad = c - x.cols;
  out.pivot_ratio[n] = ratio;
  out.bad_pivots[n] = bad;
  out.rank_deficient[n] = bad > 0;
  out.logdet[n] =
      bad > 0 ? -__builtin_inf() : 2 * (__builtin_log(mantissas) + static_cast<double>(exponents) * log_two);
  if (out.inverse && bad == 0) invert_sample(l, c, l + c * c, out.inverse + n * c * c);
}

template <typename T>
void gram_stats(const Matrices<T>& x, std::int64_t begin, std::int64_t end, const GramStatsOut& out) {
  constexpr int width = Simd<double>::width;
  typedef typename Simd<double>::I I;
  const int c = static_cast<int>(x.rows);
  const std::int64_t block = block_of(c, x.cols), square = static_cast<std::int64_t>(c) * c;
  const Workspace<double> room(width * square + c * block + c * width);
  double* grams = room.get();
  double* pack = grams + width * square;
  double* tail = pack + c * block;
  const Workspace<V<double>> vectors(ldl_vectors(c) + c + (out.inverse ? inverse_vectors(c) : 0));
  V<double>* a = vectors.get();
  V<double>* inverse = a + packed(c, 0);
  V<double>* diagonal = a + ldl_vectors(c);
  V<double>* m = diagonal + c;
  const Workspace<double> rows(c * lq_pitch(c, x.cols) + 2 * square);
  const double tolerance = gram_tolerance<T>(c, x.cols);
  const double lost_below = tolerance > lost_digits<T>() ? tolerance : lost_digits<T>();
  for (std::int64_t first = begin; first < end; first += width) {
    const int lanes = end - first < width ? static_cast<int>(end - first) : width;
    const double* sample[width];
    double* to[width];
    for (int s = 0; s < width; ++s) {
      const std::int64_t n = first + s, last = first + lanes - 1;
      double* g = out.gram ? out.gram + (s < lanes ? n : last) * square
                           : grams + (s < lanes ? s : lanes - 1) * square;
      sample[s] = g;
      to[s] = out.inverse ? out.inverse + (s < lanes ? n : last) * square : nullptr;
      if (s < lanes) {
        gram_sample<T>(x.sample(n), x.sample(n + 1 < end ? n + 1 : n), x, block, pack, tail, g, c);
        if (out.gram) mirror(g, c);
      }
    }
    const V<double> bad = load_lower<double>(sample, c, c, 1, a);
    V<double> trace = {}, diagonal_sq = {}, off_sq = {};
    for (int i = 0; i < c; ++i) {
      const V<double>* row = a + packed(i, 0);
      for (int j = 0; j < i; ++j) off_sq += row[j] * row[j];
      trace += row[i];
      diagonal_sq += row[i] * row[i];
      diagonal[i] = row[i];
    }
    Pivots<double> pivots(tolerance);
    ldl<double>(a, c, inverse, inverse + c, pivots);
    V<double> ratio = broadcast(1.0);
    for (int k = 0; k < c; ++k) {
      const V<double> pivot = a[packed(k, k)], whole = diagonal[k];
      const V<double> part = whole > 0 ? pivot / whole : V<double>{};
      ratio = part < ratio ? part : ratio;
    }
    const I all = I{} - 1, doubtful = c > x.cols ? all : (ratio < lost_below) | ~pivots.good;
    const I lost = (bad == 0.0) & doubtful;
    const V<double> logdet = logdet_of(pivots, bad);
    if (out.inverse) store_inverse<double>(a, c, inverse, (bad == 0.0) & ~doubtful, broadcast(1.0), m, to);
    store_lanes<double>(out.logdet + first, logdet, lanes);
    store_lanes<double>(out.trace + first, trace, lanes);
    store_lanes<double>(out.frobenius_sq + first, diagonal_sq + off_sq * 2.0, lanes);
    store_lanes<double>(out.pivot_ratio + first, ratio + bad, lanes);
    for (int s = 0; s < lanes; ++s) {
      out.rank_deficient[first + s] = false;
      out.bad_pivots[first + s] = 0;
    }
    if (any(lost)) {
      for (int s = 0; s < lanes; ++s) {
        if (lost[s]) {
          stats_of_rows<T>(x, first + s, reinterpret_cast<const double*>(diagonal) + s, width, rows.get(),
                           out);
        }
      }
    }
  }
}

// 2 (g_tr I + 2 g_F G + g_ld G^-1) x of one sample. The sums run in double, whatever the rows' type; rows of
// x in blocks of columns, R of them combined at a time.
template <typename T, int R>
FLATKERN_INLINE void combine_rows(const double* f, std::int64_t c, const double* pack, std::int64_t pitch,
                                  std::int64_t n, std::int64_t i0, T* out, std::int64_t stride) {
  constexpr int width = Simd<double>::width, N = 2;
  std::int64_t k = 0;
  for (; k < n; k += N * width) {
    V<double> acc[R][N] = {};
    for (std::int64_t j = 0; j < c; ++j) {
      V<double> right[N];
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) right[s] = load<double>(pack + j * pitch + k + s * width);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V<double> left = broadcast(f[(i0 + r) * c + j]);
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) acc[r][s] += left * right[s];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* to = out + (i0 + r) * stride + k;
#pragma GCC unroll 4
      for (int s = 0; s < N; ++s) {
        const std::int64_t rest = n - k - s * width;
        if (rest >= width) {
          store_narrow(to + s * width, acc[r][s]);
        } else if (rest > 0) {
          double values[width];
          store<double>(values, acc[r][s]);
          for (std::int64_t t = 0; t < rest; ++t) to[s * width + t] = static_cast<T>(values[t]);
        }
      }
    }
  }
}

template <typename T>
void gram_pullback(const Matrices<T>& x, const GramCotangents& g, std::int64_t begin, std::int64_t end,
                   T* out) {
  constexpr int width = Simd<double>::width;
  const std::int64_t c = x.rows, d = x.cols, square = c * c, block = block_of(c, d);
  const std::int64_t pitch = (block + 2 * width - 1) / (2 * width) * (2 * width);
  const Workspace<double> room(square + c * pitch);
  double* f = room.get();
  double* pack = f + square;
  for (std::int64_t n = begin; n < end; ++n) {
    const double by_gram = 4 * g.frobenius_sq[n], by_inverse = 2 * g.logdet[n], by_one = 2 * g.trace[n];
    for (std::int64_t e = 0; e < square; ++e) f[e] = 0;
    // a matrix whose weight is zero is left out, whatever it holds
    if (by_gram != 0) {
      for (std::int64_t e = 0; e < square; ++e) f[e] += by_gram * g.gram[n * square + e];
    }
    if (by_inverse != 0) {
      for (std::int64_t e = 0; e < square; ++e) f[e] += by_inverse * g.inverse[n * square + e];
    }
    for (std::int64_t i = 0; i < c; ++i) f[i * c + i] += by_one;
    const T* from = x.sample(n);
    T* to = out + n * c * d;
    for (std::int64_t d0 = 0; d0 < d; d0 += block) {
      const std::int64_t m = d - d0 < block ? d - d0 : block;
      for (std::int64_t i = 0; i < c; ++i) {
        const T* row = from + i * x.row_stride + d0 * x.col_stride;
        double* packed_row = pack + i * pitch;
        if (x.col_stride == 1) {
          to_double(row, m, packed_row, 0);
        } else {
          for (std::int64_t k = 0; k < m; ++k) packed_row[k] = static_cast<double>(row[k * x.col_stride]);
        }
        for (std::int64_t k = m; k < pitch && k < m + 2 * width; ++k) packed_row[k] = 0;
      }
      std::int64_t i = 0;
      for (; i + 4 <= c; i += 4) combine_rows<T, 4>(f, c, pack, pitch, m, i, to + d0, d);
      for (; i + 2 <= c; i += 2) combine_rows<T, 2>(f, c, pack, pitch, m, i, to + d0, d);
      for (; i < c; ++i) combine_rows<T, 1>(f, c, pack, pitch, m, i, to + d0, d);
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
