// Singular values of the rows of each sample through their Gram matrix, and the left singular vectors.
#pragma once

#include "../common/jacobi.h"
#include "batch_gram.h"
#include "eigen.h"
#include "lq.h"

namespace flatkern::cpu::FLATKERN_ISA {

// One-sided Jacobi rotations (Hestenes 1958) of the rows of l, c x c: afterwards they are orthogonal, and
// their lengths are the singular values to full relative precision where the rows were merely badly scaled,
// to that of the largest otherwise. The rows of `u` (null: not wanted) turn along, from the identity.
FLATKERN_INLINE void jacobi_rows(double* l, double* u, std::int64_t c, std::int64_t pitch) {
  constexpr int width = Simd<double>::width;
  const double tolerance = jacobi_tolerance(static_cast<int>(c));
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool turned = false;
    for (std::int64_t i = 1; i < c; ++i) {
      for (std::int64_t j = 0; j < i; ++j) {
        double* a = l + i * pitch;
        double* b = l + j * pitch;
        const double aa = dot(a, a, pitch), bb = dot(b, b, pitch), ab = dot(a, b, pitch);
        const Rotation by = rotation_of(aa, bb, ab, tolerance);
        if (!by.turns) continue;
        turned = true;
        for (std::int64_t k = 0; k < pitch; k += width) {
          V<double> x = load<double>(a + k), y = load<double>(b + k);
          by.apply(x, y);
          store<double>(a + k, x);
          store<double>(b + k, y);
        }
        if (!u) continue;
        for (std::int64_t k = 0; k < c; ++k) by.apply(u[i * c + k], u[j * c + k]);
      }
    }
    if (!turned) return;
  }
}

// Singular values in descending order, and the rows of u with them.
FLATKERN_INLINE void sort_descending(double* values, double* u, std::int64_t c) {
  for (std::int64_t i = 1; i < c; ++i) {
    for (std::int64_t j = i; j > 0 && values[j] > values[j - 1]; --j) {
      const double v = values[j];
      values[j] = values[j - 1];
      values[j - 1] = v;
      for (std::int64_t k = 0; u && k < c; ++k) {
        const double w = u[j * c + k];
        u[j * c + k] = u[(j - 1) * c + k];
        u[(j - 1) * c + k] = w;
      }
    }
  }
}

// Values [n, c] descending; `vectors` (may be null) [n, c, c], row j the left singular vector of value j.
// Samples whose least eigenvalue is below `floor` times the largest have lost its digits in the Gram matrix
// and are decomposed directly.
template <typename T>
void gram_spectrum(const Matrices<T>& x, double floor, std::int64_t begin, std::int64_t end, double* values,
                   double* vectors) {
  constexpr int width = Simd<double>::width;
  typedef typename Simd<double>::I I;
  const int c = static_cast<int>(x.rows);
  const std::int64_t block = block_of(c, x.cols), square = static_cast<std::int64_t>(c) * c;
  const std::int64_t jacobi_pitch = (c + width - 1) / width * width;
  const Workspace<double> room(width * square + c * block + c * width);
  double* grams = room.get();
  double* pack = grams + width * square;
  double* tail = pack + c * block;
  const Workspace<V<double>> rooms(packed(c, 0) + 6 * c + (vectors ? square : 0));
  V<double>* a = rooms.get();
  V<double>* d = a + packed(c, 0);
  V<double>* e = d + c;
  V<double>* h = e + c;
  V<double>* scratch = h + c;
  V<double>* z = scratch + 3 * c;
  const Workspace<double> rows(c * lq_pitch(c, x.cols) + square + c * jacobi_pitch);
  for (std::int64_t first = begin; first < end; first += width) {
    const int lanes = end - first < width ? static_cast<int>(end - first) : width;
    const double* sample[width];
    for (int s = 0; s < width; ++s) {
      const std::int64_t n = first + s;
      sample[s] = grams + (s < lanes ? s : lanes - 1) * square;
      if (s < lanes) {
        gram_sample<T>(x.sample(n), x.sample(n + 1 < end ? n + 1 : n), x, block, pack, tail,
                       grams + s * square, c);
      }
    }
    const V<double> bad = load_lower<double>(sample, c, c, 1, a);
    V<double> trace = {};
    for (int i = 0; i < c; ++i) trace += a[packed(i, i)];
    const V<double> down = power_below(trace);
    const std::int64_t entries = packed(c, 0);
    for (std::int64_t k = 0; k < entries; ++k) a[k] = bad == 0.0 ? a[k] * down : V<double>{};
    tridiagonalize(a, c, d, e, h, scratch);
    if (vectors) accumulate_reflections(a, c, h, z);
    const I failed = vectors ? ql<true>(d, e, c, z, scratch) : ql<false>(d, e, c, z, scratch);
    V<double> least = broadcast(__builtin_inf()), most = {};
    for (int k = 0; k < c; ++k) {
      least = d[k] < least ? d[k] : least;
      most = d[k] > most ? d[k] : most;
    }
    const V<double> up = broadcast(1.0) / down;
    for (int k = 0; k < c; ++k) d[k] = square_root(d[k] > 0.0 ? d[k] * up : V<double>{});
    const I lost = (bad == 0.0) & (most > 0.0) & (least < most * floor) & (c > x.cols ? I{} : I{} - 1);
    const double nan = __builtin_nan("");
    for (int s = 0; s < lanes; ++s) {
      double* to = values + (first + s) * c;
      double* u = vectors ? vectors + (first + s) * square : nullptr;
      const bool unknown = bad[s] != 0 || failed[s] != 0;
      if (lost[s] && !unknown) {
        double* l = rows.get() + c * lq_pitch(c, x.cols);
        double* wide = l + square;
        lq_sample<T>(x.sample(first + s), x, rows.get(), l);
        for (std::int64_t i = 0; i < c; ++i) {
          for (std::int64_t k = 0; k < jacobi_pitch; ++k)
            wide[i * jacobi_pitch + k] = k < c ? l[i * c + k] : 0;
          for (std::int64_t k = 0; u && k < c; ++k) u[i * c + k] = i == k ? 1 : 0;
        }
        jacobi_rows(wide, u, c, jacobi_pitch);
        for (std::int64_t i = 0; i < c; ++i) {
          to[i] = __builtin_sqrt(dot(wide + i * jacobi_pitch, wide + i * jacobi_pitch, jacobi_pitch));
        }
      } else {
        const double* from = reinterpret_cast<const double*>(d) + s;
        for (int k = 0; k < c; ++k) to[k] = unknown ? nan : from[k * width];
        const double* turned = reinterpret_cast<const double*>(z) + s;
        for (std::int64_t k = 0; u && k < square; ++k) u[k] = unknown ? nan : turned[k * width];
      }
      if (!unknown) sort_descending(to, u, c);
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
