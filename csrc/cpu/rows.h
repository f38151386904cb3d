// Loops over a row of any length.
#pragma once

#include "activation_jets.h"

namespace flatkern::cpu::FLATKERN_ISA {

// f(place, how many of the vector's lanes count; 0: all).
template <typename E, typename F>
FLATKERN_INLINE void each(std::int64_t n, const F& f) {
  constexpr int width = lanes<E>;
  std::int64_t i = 0;
  for (; i + width <= n; i += width) f(i, 0);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <typename E>
FLATKERN_INLINE void emit(E* out, std::int64_t i, int some, W<E> v) {
  if (some) {
    write_some(out + i, some, v);
  } else {
    write(out + i, v);
  }
}

// The sum of f over a row, in four chains so that additions do not wait for each other; f gets the place and
// gives vectors whose idle lanes are 0.
template <typename E, typename F>
FLATKERN_INLINE wide_t<E> total(std::int64_t n, const F& f) {
  constexpr int width = lanes<E>;
  W<E> a = {}, b = {}, c = {}, d = {};
  std::int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    a += f(i, 0);
    b += f(i + width, 0);
    c += f(i + 2 * width, 0);
    d += f(i + 3 * width, 0);
  }
  for (; i < n; i += width) a += f(i, n - i >= width ? 0 : static_cast<int>(n - i));
  return sum_lanes<wide_t<E>>((a + b) + (c + d));
}

}  // namespace flatkern::cpu::FLATKERN_ISA
