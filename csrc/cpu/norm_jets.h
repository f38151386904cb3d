// LayerNorm and RMSNorm with their terms along tangents, row by row; the formulas are those of
// flatkern/kernels/_norm_jets.py.
#pragma once

#include <cmath>

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
FLATKERN_INLINE wide_t<E> mean_of(const E* row, std::int64_t n, bool wanted) {
  if (!wanted) return wide_t<E>(0);
  const wide_t<E> sum = total<E>(
      n, [&](std::int64_t i, int some) __attribute__((always_inline)) { return take(row, i, some); });
  return sum / static_cast<wide_t<E>>(n);
}

// x hat into `unit` (0 beyond the row's end); 1 / sigma.
template <typename E>
FLATKERN_INLINE wide_t<E> normalize(const E* x, std::int64_t n, double eps, bool centred, wide_t<E>* unit) {
  typedef wide_t<E> T;
  const T mean = mean_of(x, n, centred);
  const T square = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
    const V<T> c = only<E>(take(x, i, some) - mean, some);
    store<T>(unit + i, c);
    return c * c;
  });
  const T inverse = T(1) / std::sqrt(square / static_cast<T>(n) + static_cast<T>(eps));
  each<E>(n, [&](std::int64_t i, int)
                 __attribute__((always_inline)) { store<T>(unit + i, load<T>(unit + i) * inverse); });
  return inverse;
}

template <typename E>
FLATKERN_INLINE W<E> scaled(W<E> v, const E* weight, std::int64_t i, int some) {
  return weight ? v * take(weight, i, some) : v;
}

template <typename E>
void norm_jet(const NormJetArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>* unit) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  for (std::int64_t r = begin; r < end && n > 0; ++r) {
    const T inverse = normalize(a.x + r * n, n, a.eps, a.centred, unit), per = T(1) / static_cast<T>(n);
    each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
      const V<T> y = scaled<E>(load<T>(unit + i), a.weight, i, some);
      emit(a.value + r * n, i, some, a.bias ? y + take(a.bias, i, some) : y);
    });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E* t = a.t + at;
      const T mean = mean_of(t, n, a.centred);
      V<T> along = {}, square = {};
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = only<E>(take(t, i, some) - mean, some);
        along += load<T>(unit + i) * c;
        square += c * c;
      });
      const T p = sum_lanes<T>(along) * per, q = sum_lanes<T>(square) * per;
      const T bend = (T(3) * p * p - q) * inverse * inverse, turn = T(-2) * p * inverse * inverse;
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = take(t, i, some) - mean, u = load<T>(unit + i);
        emit(a.first + at, i, some, scaled<E>((c - u * p) * inverse, a.weight, i, some));
        emit(a.second + at, i, some, scaled<E>(u * bend + c * turn, a.weight, i, some));
      });
    }
  }
}

// `scratch` holds two rows, each rounded up to whole vectors.
template <typename E>
void norm_pullback(const NormPullbackArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>* scratch) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  T *unit = scratch, *h = scratch + (n + kRowPadding - 1) / kRowPadding * kRowPadding;
  for (std::int64_t r = begin; r < end && n > 0; ++r) {
    const T inverse = normalize(a.x + r * n, n, a.eps, a.centred, unit), per = T(1) / static_cast<T>(n);
    const E* g = a.g + r * n;
    const T total_h = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
      const V<T> v = scaled<E>(take(g, i, some), a.weight, i, some);
      store<T>(h + i, v);
      return v;
    });
    const T mean_h = a.centred ? total_h * per : T(0);
    const T along = per * total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
                      const V<T> v = only<E>(load<T>(h + i) - mean_h, some);
                      store<T>(h + i, v);
                      return v * load<T>(unit + i);
                    });
    each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
      emit(a.cotangent + r * n, i, some, (load<T>(h + i) - load<T>(unit + i) * along) * inverse);
    });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E *t = a.t + at, *dg = a.dg + at;
      const T mean_t = mean_of(t, n, a.centred);
      V<T> moved = {}, across = {}, own = {}, sum = {};
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = only<E>(take(t, i, some) - mean_t, some), u = load<T>(unit + i);
        const V<T> dh = scaled<E>(take(dg, i, some), a.weight, i, some);
        moved += u * c;
        across += load<T>(h + i) * c;
        own += u * dh;
        sum += dh;
      });
      const T p = sum_lanes<T>(moved) * per;
      const T mean_dh = a.centred ? sum_lanes<T>(sum) * per : T(0);
      // mean(dh unit) + mean(h unit'), unit' = (c - unit p) / sigma
      const T turn = sum_lanes<T>(own) * per + inverse * (sum_lanes<T>(across) * per - p * along);
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = take(t, i, some) - mean_t, u = load<T>(unit + i);
        const V<T> dh = scaled<E>(take(dg, i, some), a.weight, i, some) - mean_dh;
        const V<T> pulled = load<T>(h + i) - u * along;
        const V<T> bent = dh - (c - u * p) * (inverse * along) - u * turn;
        emit(a.tangents + at, i, some, (bent - pulled * (p * inverse)) * inverse);
      });
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
