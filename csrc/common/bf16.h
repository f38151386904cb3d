// bfloat16 as storage: the upper half of a float.
#pragma once

#include <cstdint>
#include <cstring>

#include "hd.h"

namespace flatkern {

struct Bf16 {
  std::uint16_t bits;
};

// The type that values of a storage type are computed in.
template <typename E>
struct Wide {
  typedef E type;
};
template <>
struct Wide<Bf16> {
  typedef float type;
};
template <typename E>
using wide_t = typename Wide<E>::type;

FLATKERN_HD float widen(float x) {
  return x;
}
FLATKERN_HD double widen(double x) {
  return x;
}
FLATKERN_HD float widen(Bf16 x) {
  const std::uint32_t word = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &word, sizeof y);
  return y;
}

FLATKERN_HD void narrow(float x, float* to) {
  *to = x;
}
FLATKERN_HD void narrow(double x, double* to) {
  *to = x;
}
// To the nearest, ties to even; NaN stays NaN.
FLATKERN_HD void narrow(float x, Bf16* to) {
  std::uint32_t word;
  memcpy(&word, &x, sizeof word);
  const bool nan = x != x;
  to->bits =
      nan ? std::uint16_t(0x7fc0) : static_cast<std::uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

}  // namespace flatkern
