// One-sided Jacobi rotations (Hestenes 1958) that make rows orthogonal: the rotation of two rows, and an
// order in which all pairs are met by rounds of pairs without a row in common.
#pragma once

#include <cmath>

#include "hd.h"
#include "spd_math.h"

namespace flatkern {

// a, b become co a - si b and si a + co b, where co = 1 - si tau. Applied in this form (Rutishauser 1966) a
// small rotation moves the lengths by little: a rounded co would scale both rows by its own error, which adds
// up over the sweeps.
struct Rotation {
  bool turns;
  double si, tau;

  template <typename T>
  FLATKERN_HD void apply(T& a, T& b) const {
    const T x = a, y = b;
    a = x - si * (y + tau * x);
    b = y + si * (x - tau * y);
  }
};

// Below this cosine between two rows they count as orthogonal.
FLATKERN_HD double jacobi_tolerance(int c) {
  return 2 * Limits<double>::eps * sqrt(static_cast<double>(c));
}

// From the squared lengths and the dot of two rows a and b.
FLATKERN_HD Rotation rotation_of(double aa, double bb, double ab, double tolerance) {
  if (!(fabs(ab) > tolerance * sqrt(aa) * sqrt(bb))) return {false, 0, 0};
  const double zeta = (bb - aa) / (2 * ab), root = sqrt(1 + zeta * zeta);
  const double t = 1 / (zeta < 0 ? zeta - root : zeta + root), co = 1 / sqrt(1 + t * t);
  return {true, t * co, t * co / (1 + co)};
}

// Pair p < m / 2 of round r < m - 1 of m rows, m even (the last may be one that is not there): m - 1 stays,
// the others go round.
struct RowPair {
  int i, j;
};

FLATKERN_HD RowPair round_robin(int m, int r, int p) {
  const int n = m - 1;
  const int i = p == 0 ? n : (r + p) % n, j = (r + n - p) % n;
  return i > j ? RowPair{i, j} : RowPair{j, i};
}

}  // namespace flatkern
