// Numbers of twice the precision, as unevaluated sums of two doubles (Dekker 1971; Knuth, TAOCP 4.2.2).
#pragma once

#include <cmath>

#include "hd.h"

namespace flatkern {

struct DoubleDouble {
  double hi, lo;  // |lo| <= ulp(hi) / 2
};

// a + b exactly; needs |a| >= |b| or a == 0.
FLATKERN_HD DoubleDouble quick_two_sum(double a, double b) {
  const double s = a + b;
  return {s, b - (s - a)};
}

// a + b exactly.
FLATKERN_HD DoubleDouble two_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

FLATKERN_HD DoubleDouble add(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble high = two_sum(a.hi, b.hi), low = two_sum(a.lo, b.lo);
  const DoubleDouble sum = quick_two_sum(high.hi, high.lo + low.hi);
  return quick_two_sum(sum.hi, sum.lo + low.lo);
}

// a + x y, the product taken exactly.
FLATKERN_HD DoubleDouble add_product(DoubleDouble a, double x, double y) {
  const double p = x * y;
  return add(a, {p, fma(x, y, -p)});
}

FLATKERN_HD DoubleDouble multiply(DoubleDouble a, DoubleDouble b) {
  const double p = a.hi * b.hi;
  const double rest = fma(a.hi, b.hi, -p) + (a.hi * b.lo + a.lo * b.hi);
  return quick_two_sum(p, rest);
}

FLATKERN_HD DoubleDouble negate(DoubleDouble a) {
  return {-a.hi, -a.lo};
}

// 1 / a by two Newton steps.
FLATKERN_HD DoubleDouble reciprocal(DoubleDouble a) {
  const double first = 1 / a.hi;
  DoubleDouble r = {first, 0};
  for (int step = 0; step < 2; ++step) {
    const DoubleDouble error = add({1, 0}, negate(multiply(a, r)));
    r = add(r, multiply(r, error));
  }
  return r;
}

}  // namespace flatkern
