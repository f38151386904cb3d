// The triangular factor of the rows of one sample, x = L Q, where their Gram matrix has lost the digits.
#pragma once

#include "batch_spd.h"

namespace flatkern::cpu::FLATKERN_ISA {

constexpr std::int64_t kLqColumns = 512;  // columns taken in at a time, beside the factor so far

FLATKERN_INLINE std::int64_t lq_pitch(std::int64_t c, std::int64_t d) {
  const std::int64_t columns = (d < kLqColumns ? d : kLqColumns) + (d > kLqColumns ? c : 0);
  return (columns + Simd<double>::width - 1) / Simd<double>::width * Simd<double>::width;
}

FLATKERN_INLINE double dot(const double* a, const double* b, std::int64_t n) {
  constexpr int width = Simd<double>::width;
  V<double> sum[4] = {};
  std::int64_t k = 0;
  for (; k + 4 * width <= n; k += 4 * width) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) sum[t] += load<double>(a + k + t * width) * load<double>(b + k + t * width);
  }
  for (; k < n; k += width) sum[0] += load<double>(a + k) * load<double>(b + k);
  double lanes[width], total = 0;
  store<double>(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int s = 0; s < width; ++s) total += lanes[s];
  return total;
}

// b -= f a
FLATKERN_INLINE void subtract(double f, const double* a, double* b, std::int64_t n) {
  constexpr int width = Simd<double>::width;
  const V<double> factor = broadcast(f);
  for (std::int64_t k = 0; k < n; k += width) {
    store<double>(b + k, load<double>(b + k) - factor * load<double>(a + k));
  }
}

// Modified Gram-Schmidt of the rows of w (n elements each, a multiple of the vector width): backward stable
// for the factor L, row by row. `l` gets L, c x c, zeros above the diagonal; `w` is spoiled.
FLATKERN_INLINE void gram_schmidt(double* w, std::int64_t pitch, std::int64_t n, std::int64_t c, double* l) {
  for (std::int64_t i = 0; i < c; ++i) {
    double* row = w + i * pitch;
    const double norm = __builtin_sqrt(dot(row, row, n));
    const double inverse = norm > 0 ? 1 / norm : 0;
    for (std::int64_t k = 0; k < n; ++k) row[k] *= inverse;
    l[i * c + i] = norm;
    for (std::int64_t j = i + 1; j < c; ++j) {
      const double part = dot(row, w + j * pitch, n);
      l[j * c + i] = part;
      l[i * c + j] = 0;
      subtract(part, row, w + j * pitch, n);
    }
  }
}

// L of one sample. Columns come in blocks: [L x_block] has the same L as all columns so far. `w` is room for
// c lq_pitch(c, d) values.
template <typename T>
FLATKERN_INLINE void lq_sample(const T* x, const Matrices<T>& m, double* w, double* l) {
  const std::int64_t c = m.rows, d = m.cols, pitch = lq_pitch(c, d);
  for (std::int64_t d0 = 0; d0 < d; d0 += kLqColumns) {
    const std::int64_t n = d - d0 < kLqColumns ? d - d0 : kLqColumns, before = d0 > 0 ? c : 0;
    for (std::int64_t i = 0; i < c; ++i) {
      double* to = w + i * pitch;
      for (std::int64_t k = 0; k < before; ++k) to[k] = l[i * c + k];
      const T* from = x + i * m.row_stride + d0 * m.col_stride;
      for (std::int64_t k = 0; k < n; ++k) to[before + k] = static_cast<double>(from[k * m.col_stride]);
      for (std::int64_t k = before + n; k < pitch; ++k) to[k] = 0;
    }
    gram_schmidt(w, pitch, pitch, c, l);
  }
}

// (L L^T)^-1 for one sample, both triangles, from L with a positive diagonal; `w` is room for c c values.
FLATKERN_INLINE void invert_sample(const double* l, std::int64_t c, double* w, double* out) {
  for (std::int64_t i = 0; i < c; ++i) {  // row i of L^-1, a combination of the rows before
    double* row = w + i * c;
    for (std::int64_t k = 0; k < c; ++k) row[k] = k == i ? 1 : 0;
    for (std::int64_t j = 0; j < i; ++j) {
      for (std::int64_t k = 0; k <= j; ++k) row[k] -= l[i * c + j] * w[j * c + k];
    }
    const double inverse = 1 / l[i * c + i];
    for (std::int64_t k = 0; k <= i; ++k) row[k] *= inverse;
  }
  for (std::int64_t e = 0; e < c * c; ++e) out[e] = 0;
  for (std::int64_t k = 0; k < c; ++k) {
    for (std::int64_t i = 0; i <= k; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) out[i * c + j] += w[k * c + i] * w[k * c + j];
    }
  }
  for (std::int64_t i = 0; i < c; ++i) {
    for (std::int64_t j = 0; j < i; ++j) out[j * c + i] = out[i * c + j];
  }
}

// The factors of the samples marked in `wanted`, c x c each; zeros for the others.
template <typename T>
void lq(const Matrices<T>& x, const bool* wanted, std::int64_t begin, std::int64_t end, double* out) {
  const std::int64_t c = x.rows, square = c * c;
  const Workspace<double> room(c * lq_pitch(c, x.cols) + 1);
  for (std::int64_t n = begin; n < end; ++n) {
    double* l = out + n * square;
    for (std::int64_t e = 0; e < square; ++e) l[e] = 0;
    if (wanted[n]) lq_sample<T>(x.sample(n), x, room.get(), l);
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
