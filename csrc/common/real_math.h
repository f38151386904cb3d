// Elementary functions for the activations, for one number or a vector of them (GCC's vector types): the CPU
// kernels run them on vectors, the CUDA kernels on single numbers, the tests on both. Arguments are such that
// nothing overflows: exponentials are taken of numbers <= 0 only.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "hd.h"

namespace flatkern {

template <typename N>
struct Real {  // a vector
  typedef std::remove_reference_t<decltype(std::declval<N&>()[0])> Element;
  static constexpr bool wide = sizeof(Element) == 8;
  typedef std::conditional_t<wide, std::uint64_t, std::uint32_t> Word;
  typedef Word Bits __attribute__((vector_size(sizeof(N))));
};

template <>
struct Real<float> {
  typedef float Element;
  static constexpr bool wide = false;
  typedef std::uint32_t Word;
  typedef std::uint32_t Bits;
};

template <>
struct Real<double> {
  typedef double Element;
  static constexpr bool wide = true;
  typedef std::uint64_t Word;
  typedef std::uint64_t Bits;
};

template <typename To, typename From>
FLATKERN_HD To bits_as(From x) {
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <typename N>
FLATKERN_HD N constant(double x) {
  return N{} + static_cast<typename Real<N>::Element>(x);
}

template <typename N>
FLATKERN_HD typename Real<N>::Bits sign_bit() {
  using R = Real<N>;
  return typename R::Bits{} + (typename R::Word(1) << (8 * sizeof(typename R::Word) - 1));
}

template <typename N>
FLATKERN_HD N absolute(N x) {
  return bits_as<N>(bits_as<typename Real<N>::Bits>(x) & ~sign_bit<N>());
}

// |magnitude| with the sign of `sign`.
template <typename N>
FLATKERN_HD N with_sign(N magnitude, N sign) {
  typedef typename Real<N>::Bits B;
  const B s = sign_bit<N>();
  return bits_as<N>((bits_as<B>(magnitude) & ~s) | (bits_as<B>(sign) & s));
}

template <typename N>
FLATKERN_HD N horner(N, double last) {
  return constant<N>(last);
}

// first + x (second + x (...)).
template <typename N, typename... Rest>
FLATKERN_HD N horner(N x, double first, double second, Rest... rest) {
  return horner(x, second, rest...) * x + static_cast<typename Real<N>::Element>(first);
}

template <typename N>
struct Exponential {
  N exp, expm1;
};

// e^(x + low) and e^(x + low) - 1, each to about an ulp, for x <= 0 and a correction |low| far below 1.
// x + low = n ln 2 + r; both come from expm1(r), so that near 0 the second keeps its digits. Below the normal
// range the first stays at some 1e-38 (1e-308). The rounding to n works by a number so large that its last
// bit counts ones.
template <typename N>
FLATKERN_HD Exponential<N> exponential(N x, N low) {
  using R = Real<N>;
  typedef typename R::Element T;
  typedef typename R::Bits B;
  constexpr bool wide = R::wide;
  constexpr T lowest = wide ? T(-708.0) : T(-87.0), shifter = wide ? T(6755399441055744.0) : T(12582912.0);
  constexpr T per_ln2 = T(1.4426950408889634);
  constexpr T ln2_high = wide ? T(6.93147180369123816490e-01) : T(0.693145751953125);
  constexpr T ln2_low = wide ? T(1.90821492927058770002e-10) : T(1.4286067653302e-06);
  constexpr int mantissa = wide ? 52 : 23, bias = wide ? 1023 : 127;
  const N inside = x < lowest ? constant<N>(lowest) : x;
  const N shifted = inside * per_ln2 + shifter;
  const N n = shifted - shifter;
  const N r = (inside - n * ln2_high) - (n * ln2_low - low);
  const B scale_bits = (bits_as<B>(shifted) + typename R::Word(bias)) << mantissa;
  const N scale = bits_as<N>(scale_bits);
  N p;
  if constexpr (wide) {
    p = horner(r, 0.5, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
               1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800);
  } else {
    p = horner(r, 0.5, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040);
  }
  const N small = r * r * p + r;  // expm1(r)
  Exponential<N> out;
  out.expm1 = scale * small + (scale - T(1));
  out.exp = scale * small + scale;
  return out;
}

template <typename N>
FLATKERN_HD Exponential<N> exponential(N x) {
  return exponential(x, N{});
}

// e^x for x <= 0, and exactly 0 where that is below the normal range: masked classes have no weight.
template <typename N>
FLATKERN_HD N weight_of(N x) {
  typedef typename Real<N>::Element T;
  return x < (Real<N>::wide ? T(-708.0) : T(-87.0)) ? N{} : exponential(x).exp;
}

// log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3.
template <typename N>
FLATKERN_HD N log_one_plus(N e) {
  typedef typename Real<N>::Element T;
  const N s = e / (e + T(2));
  const N w = s * s;
  N q;
  if constexpr (Real<N>::wide) {
    q = horner(w, 0.6666666666666666, 0.40000000000014585, 0.2857142856710876, 0.22222222717427864,
               0.18181789436132859, 0.15385570064958623, 0.13314144209654935, 0.12001072809590713,
               0.08800738486144674, 0.1616404561194353);
  } else {
    q = horner(w, 0.6666666732052742, 0.3999970633192972, 0.28592357994302836, 0.21706575800880373,
               0.2322432922402335);
  }
  return s * w * q + s * T(2);
}

// (u + c) e^(u^2/2) (1 - Phi(u)) for u >= 0, Phi the normal distribution function, as a polynomial in (u -
// c)/(u + c); the caller divides by u + c. Relative error 2^-24.5 up to u = 14 in float, 2^-56 up to u = 39
// in double (Chebyshev interpolation in 50 digits).
template <typename N>
FLATKERN_HD N normal_tail(N u, N* per) {
  typedef typename Real<N>::Element T;
  constexpr T c = Real<N>::wide ? T(5) : T(3.8);
  *per = T(1) / (u + c);
  const N t = (u - c) * *per;
  if constexpr (Real<N>::wide) {
    return horner(t, 0.769193049750063, -0.6653825028900567, 0.4953056159699764, -0.31353315667130455,
                  0.1650203661703847, -0.06911863870631016, 0.020795066799883178, -0.0029933767705085422,
                  -0.0007978693984660701, 0.0005448990647731298, -5.937572800991586e-05,
                  -4.97628142705858e-05, 1.6681213742042063e-05, 3.9809021578680414e-06,
                  -2.76926709599743e-06, -3.366153681012471e-07, 4.331410356862585e-07,
                  4.2274993740065346e-08, -6.594221662477223e-08, -9.31356099432606e-09, 7.66307180076004e-09,
                  1.753048401408232e-09, -1.5877468827473365e-10);
  } else {
    return horner(t, 0.7513573639718513, -0.5923482203670233, 0.3600382303250143, -0.15857573634693992,
                  0.041883040917909016, -0.0002959338900237991, -0.004218976649119236, 0.0007517032401798303,
                  0.00047217395740620444);
  }
}

}  // namespace flatkern
