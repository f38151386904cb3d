// Decisions every kernel must take alike, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "hd.h"

namespace flatkern {

template <typename T>
struct Limits;

template <>
struct Limits<float> {
  static constexpr float eps = 1.1920928955078125e-07f;         // 2^-23
  static constexpr float min_normal = 1.1754943508222875e-38f;  // 2^-126
};

template <>
struct Limits<double> {
  static constexpr double eps = 2.220446049250313e-16;           // 2^-52
  static constexpr double min_normal = 2.2250738585072014e-308;  // 2^-1022
};

// Where element (i, j), j <= i, of a lower triangle packed by rows lies.
FLATKERN_HD constexpr std::int64_t packed(std::int64_t i, std::int64_t j) {
  return i * (i + 1) / 2 + j;
}

// A pivot of L D L^T is the diagonal entry minus sums no larger than it: its rounding error is about
// c eps times that entry. At or below it the pivot says nothing any more.
template <typename T>
FLATKERN_HD constexpr T spd_tolerance(std::int64_t c) {
  return static_cast<T>(c) * Limits<T>::eps;
}

// The same for a Gram matrix of c rows of length d, accumulated in double from entries of type T: the sums
// over d round as well, and a row of single precision is known to within eps(float) only, squared in the
// Gram.
template <typename T>
FLATKERN_HD constexpr double gram_tolerance(std::int64_t c, std::int64_t d) {
  const double sums = static_cast<double>(c > d ? c : d) * Limits<double>::eps;
  const double input =
      static_cast<double>(c) * static_cast<double>(Limits<T>::eps) * static_cast<double>(Limits<T>::eps);
  return sums > input ? sums : input;
}

// At a pivot below this part of its diagonal entry a Gram matrix in double has lost too many digits, and the
// rows themselves are factored. Entries of single precision are uncertain enough for two digits less.
template <typename T>
FLATKERN_HD constexpr double lost_digits() {
  return sizeof(T) == 4 ? 1e-10 : 1e-8;
}

// The square of l_kk of the rows' own factorization x = L Q is no good at this part of the diagonal entry. A
// row that depends on those before comes out as the rounding of the rows, enlarged by the condition of those
// before: 1024 sqrt(c) eps leaves room for that. Rows of single precision as above.
template <typename T>
FLATKERN_HD constexpr double lq_tolerance(std::int64_t c) {
  const double eps = static_cast<double>(Limits<T>::eps), factor = sizeof(T) == 4 ? 1 : 1048576;
  return static_cast<double>(c) * factor * eps * eps;
}

// Also false for a NaN pivot. Below the normal range 1 / pivot overflows, so such a pivot counts as zero.
template <typename T>
FLATKERN_HD bool good_pivot(T pivot, T diagonal, T tolerance) {
  return pivot > tolerance * diagonal && pivot >= Limits<T>::min_normal;
}

// False for NaN and infinities.
template <typename T>
FLATKERN_HD bool is_finite(T x) {
  return x - x == T(0);
}

}  // namespace flatkern
