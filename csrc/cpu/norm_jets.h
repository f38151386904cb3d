// LayerNorm's terms along tangents, row by row, from what was normalized and 1 / sigma; the formulas are
// those of flatkern/kernels/_norm_jets.py.
#pragma once

#include "rows.h"

namespace flatkern::cpu::FLATKERN_ISA {

// The lanes of v that count, 0 in the others.
template <typename E>
FLATKERN_INLINE W<E> only(W<E> v, int some) {
  if (!some) return v;
  wide_t<E> room[lanes<E>];
  store<wide_t<E>>(room, v);
  return read_some<wide_t<E>>(room, some, wide_t<E>(0));
}

template <typename E>
FLATKERN_INLINE wide_t<E> mean_of(const E* row, std::int64_t n) {
  const wide_t<E> sum = total<E>(
      n, [&](std::int64_t i, int some) __attribute__((always_inline)) { return take(row, i, some); });
  return sum / static_cast<wide_t<E>>(n);
}

template <typename E>
FLATKERN_INLINE W<E> scaled(W<E> v, const E* weight, std::int64_t i, int some) {
  return weight ? v * take(weight, i, some) : v;
}

template <typename E>
void norm_tangent(const NormTangentArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>*) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  for (std::int64_t r = begin; r < end && n > 0; ++r) {
    const E* unit = a.unit + r * n;
    const T inverse = a.inverse[r];
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E* t = a.t + at;
      const T mean = mean_of(t, n);
      const T p = total<E>(n,
                           [&](std::int64_t i, int some) __attribute__((always_inline)) {
                             return take(unit, i, some) * (take(t, i, some) - mean);
                           }) /
                  static_cast<T>(n);
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> w = (take(t, i, some) - mean - take(unit, i, some) * p) * inverse;
        emit(a.tangent + at, i, some, scaled<E>(w, a.weight, i, some));
      });
    }
  }
}

template <typename E>
void norm_curvature(const NormCurvatureArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>*) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  const T per = T(1) / static_cast<T>(n);
  for (std::int64_t r = begin; r < end; ++r) {
    const E *unit = a.unit + r * n, *g = a.g + r * n;
    const T inverse = a.inverse[r];
    const T along = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
      return take(unit, i, some) * scaled<E>(take(g, i, some), a.weight, i, some);
    });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const E* t = a.t + (j * a.rows + r) * n;
      const T mean = mean_of(t, n);
      V<T> own = {}, square = {}, across = {};
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = only<E>(take(t, i, some) - mean, some);
        own += take(unit, i, some) * c;
        square += c * c;
        across += scaled<E>(take(g, i, some), a.weight, i, some) * c;
      });
      const T p = sum_lanes<T>(own) * per, q = sum_lanes<T>(square) * per;
      a.curvature[j * a.rows + r] =
          inverse * inverse * (along * (T(3) * p * p - q) - T(2) * p * sum_lanes<T>(across));
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
