// Softmax and cross-entropy with their terms along tangents, row by row: the exponentials of a row are kept in a
// scratch row, every tangent's row is read from memory once.
#pragma once

#include <cmath>

#include "rows.h"

namespace flatkern::cpu::FLATKERN_ISA {

template <typename T>
struct Peak {
  T value;
  std::int64_t place;
};

template <typename E>
FLATKERN_INLINE Peak<wide_t<E>> peak(const E* row, std::int64_t n) {
  typedef wide_t<E> T;
  typedef typename Simd<T>::I I;
  constexpr int width = lanes<E>;
  V<T> best = read_some(row, static_cast<int>(n < width ? n : width), -T(__builtin_inf()));
  I at = {};
  for (std::int64_t i = width; i < n; i += width) {
    const V<T> x = n - i >= width ? read(row + i) : read_some(row + i, static_cast<int>(n - i), -T(__builtin_inf()));
    const auto more = x > best;
    best = more ? x : best;
    at = more ? I{} + static_cast<decltype(Simd<T>::mantissa_mask)>(i) : at;
  }
  Peak<T> out = {best[0], at[0]};
  for (int l = 1; l < width; ++l) {
    if (best[l] > out.value) out = {best[l], at[l] + l};
  }
  return out;
}

// exp(row - top) into `e`; its sum.
template <typename E>
FLATKERN_INLINE wide_t<E> exponentials(const E* row, std::int64_t n, wide_t<E> top, wide_t<E>* e) {
  typedef wide_t<E> T;
  return total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
    const V<T> x = some ? read_some(row + i, some, -T(__builtin_inf())) : read(row + i);
    const V<T> y = weight_of(x - top);
    store<T>(e + i, y);
    return y;
  });
}

template <typename E>
void softmax_jet(const SoftmaxJetArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>* e) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  if (n == 0) return;
  for (std::int64_t r = begin; r < end; ++r) {
    const E* z = a.z + r * n;
    const Peak<T> top = peak(z, n);
    const T sum = exponentials(z, n, top.value, e), per = T(1) / sum;
    const T shift = std::log(sum);
    each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
      const V<T> p = load<T>(e + i) * per;
      store<T>(e + i, p);
      emit(a.value + r * n, i, some, a.log ? take(z, i, some) - top.value - shift : p);
    });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E* t = a.t + at;
      const T mean = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        return load<T>(e + i) * take(t, i, some);
      });
      const T variance = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = take(t, i, some) - mean;
        return load<T>(e + i) * c * c;
      });
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> p = load<T>(e + i), c = take(t, i, some) - mean;
        emit(a.first + at, i, some, a.log ? c : p * c);
        emit(a.second + at, i, some, a.log ? broadcast<T>(-variance) : p * (c * c - variance));
      });
    }
  }
}

template <typename E>
void logsumexp_jet(const LogSumExpArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>* e) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  if (n == 0) return;
  for (std::int64_t r = begin; r < end; ++r) {
    const E* z = a.z + r * n;
    const Peak<T> top = peak(z, n);
    const T sum = exponentials(z, n, top.value, e);
    if (a.excess) {  // log(1 + rest) keeps the digits of a small loss
      const T own = e[top.place];
      e[top.place] = T(0);
      const T rest = total<E>(
          n, [&](std::int64_t i, int) __attribute__((always_inline)) { return load<T>(e + i); });
      e[top.place] = own;
      a.excess[r] = std::log1p(rest + (own - T(1)));  // own is 1, or NaN
    }
    const T per = T(1) / sum, scale = a.scale ? a.scale[r] : T(1);
    if (a.gradient) {
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        emit(a.gradient + r * n, i, some, load<T>(e + i) * (per * scale));
      });
    }
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E* v = a.v + at;
      const T origin = widen(v[top.place]);
      const T offset = per * total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        return load<T>(e + i) * (take(v, i, some) - origin);
      });
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        emit(a.product + at, i, some, load<T>(e + i) * (per * scale) * ((take(v, i, some) - origin) - offset));
      });
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
