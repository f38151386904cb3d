// The second-order terms of softmax, and cross-entropy with its terms along tangents, row by row: the
// exponentials of a row are kept in a scratch row, every tangent's row is read from memory once.
#pragma once

#include <cmath>

#include "rows.h"

namespace flatkern::cpu::FLATKERN_ISA {

template <typename E>
FLATKERN_INLINE wide_t<E> largest(const E* row, std::int64_t n) {
  typedef wide_t<E> T;
  constexpr int width = lanes<E>;
  constexpr T lowest = -T(__builtin_inf());
  V<T> a = broadcast<T>(lowest), b = a, c = a, d = a;
  std::int64_t i = 0;
  const auto greater = [](V<T> x, V<T> y) __attribute__((always_inline)) { return y > x ? y : x; };
  for (; i + 4 * width <= n; i += 4 * width) {
    a = greater(a, read(row + i));
    b = greater(b, read(row + i + width));
    c = greater(c, read(row + i + 2 * width));
    d = greater(d, read(row + i + 3 * width));
  }
  for (; i + width <= n; i += width) a = greater(a, read(row + i));
  if (i < n) b = greater(b, read_some(row + i, static_cast<int>(n - i), lowest));
  a = greater(greater(a, b), greater(c, d));
  T top = a[0];
  for (int l = 1; l < width; ++l) top = a[l] > top ? a[l] : top;
  return top;
}

// exp(row - top) into `e`; its sum. `place`, where wanted: an entry equal to top, or 0.
template <typename E>
FLATKERN_INLINE wide_t<E> exponentials(const E* row, std::int64_t n, wide_t<E> top, wide_t<E>* e,
                                       std::int64_t* place) {
  typedef wide_t<E> T;
  typedef typename Simd<T>::I I;
  typedef decltype(Simd<T>::mantissa_mask) Int;
  I at = I{} - 1;
  const T sum = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
    const V<T> x = some ? read_some(row + i, some, -T(__builtin_inf())) : read(row + i);
    at = x == top ? I{} + static_cast<Int>(i) : at;
    const V<T> y = weight_of(x - top);
    store<T>(e + i, y);
    return y;
  });
  if (place) {
    *place = 0;
    if (n <= 4 * lanes<E>) {  // going over the lanes would take longer
      for (std::int64_t i = 0; i < n; ++i) {
        if (e[i] == T(1)) {
          *place = i;
          break;
        }
      }
    } else {
      for (int l = 0; l < lanes<E>; ++l) {
        if (at[l] >= 0 && at[l] + l < n) *place = at[l] + l;
      }
    }
  }
  return sum;
}

// From the probabilities: the sum of p (g - <p, g>) (t - <p, t>)^2, or of its logarithm -sum(g) times the sum
// of p (t - <p, t>)^2.
template <typename E>
void softmax_curvature(const SoftmaxCurvatureArgs<E>& a, std::int64_t begin, std::int64_t end, wide_t<E>*) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  for (std::int64_t r = begin; r < end; ++r) {
    const E *p = a.p + r * n, *g = a.g + r * n;
    const T along = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
      return a.log ? take(g, i, some) : take(p, i, some) * take(g, i, some);
    });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const E* t = a.t + (j * a.rows + r) * n;
      const T mean = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        return take(p, i, some) * take(t, i, some);
      });
      const T bent = total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> c = take(t, i, some) - mean, q = take(p, i, some) * c * c;
        return a.log ? q : q * (take(g, i, some) - along);
      });
      a.curvature[j * a.rows + r] = a.log ? -along * bent : bent;
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
    std::int64_t place = 0;
    const T sum = exponentials(z, n, largest(z, n), e, &place);
    if (a.excess) {  // log(1 + rest) keeps the digits of a small loss
      const T own = e[place];
      e[place] = T(0);
      const T rest =
          total<E>(n, [&](std::int64_t i, int) __attribute__((always_inline)) { return load<T>(e + i); });
      e[place] = own;
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
      const T origin = widen(v[place]);
      const T offset = per * total<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
                         return load<T>(e + i) * (take(v, i, some) - origin);
                       });
      each<E>(n, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        emit(a.product + at, i, some,
             load<T>(e + i) * (per * scale) * ((take(v, i, some) - origin) - offset));
      });
    }
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
