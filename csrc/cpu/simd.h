// Vectors whose lanes are samples, and the in-register transposes that fill them.
// Included once per instruction set; everything lives in a namespace of that set's name, so that the linker
// can never pick code for one processor where another was meant (no standard templates here for that reason).
#pragma once

#include <cstdint>

#include "../common/spd_math.h"

#if FLATKERN_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#ifndef FLATKERN_ISA
#error "include this file through isa_*.cpp"
#endif

namespace flatkern::cpu::FLATKERN_ISA {

#define FLATKERN_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  typedef std::int32_t I __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  typedef float Q __attribute__((vector_size(16), aligned(4)));
  typedef float P __attribute__((vector_size(16)));
  static constexpr int width = FLATKERN_VECTOR_BYTES / 4;
  static constexpr int tile = 4;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr std::int32_t mantissa_mask = 0x007fffff;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  typedef std::int64_t I __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  static constexpr int width = FLATKERN_VECTOR_BYTES / 8;
  static constexpr int tile = width < 4 ? width : 4;
  typedef double Q __attribute__((vector_size(8 * (FLATKERN_VECTOR_BYTES < 32 ? 2 : 4)), aligned(8)));
  typedef double P __attribute__((vector_size(8 * (FLATKERN_VECTOR_BYTES < 32 ? 2 : 4))));
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr std::int64_t mantissa_mask = 0x000fffffffffffffLL;
};

template <typename T>
using V = typename Simd<T>::V;

template <typename T>
FLATKERN_INLINE V<T> broadcast(T x) {
  return V<T>{} + x;
}

// A vector at an address aligned to one element only.
template <typename T>
FLATKERN_INLINE V<T> load(const T* p) {
  V<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
FLATKERN_INLINE void store(T* p, V<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename A>
FLATKERN_INLINE auto concat(A a, A b) {
  constexpr int n = sizeof(A) / sizeof(a[0]);
  if constexpr (n == 4) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
}

// `tile` consecutive elements of samples r, r + tile, r + 2 tile, ... side by side.
template <typename T>
FLATKERN_INLINE V<T> load_pieces(const T* const* sample, int r, std::int64_t offset) {
  using Q = typename Simd<T>::Q;
  constexpr int tile = Simd<T>::tile, pieces = Simd<T>::width / tile;
  auto piece = [&](int k) __attribute__((always_inline)) {
    typedef T P __attribute__((vector_size(sizeof(Q))));
    P p;
    __builtin_memcpy(&p, sample[r + k * tile] + offset, sizeof p);
    return p;
  };
  if constexpr (pieces == 1) {
    return piece(0);
  } else if constexpr (pieces == 2) {
    return concat(piece(0), piece(1));
  } else {
    return concat(concat(piece(0), piece(1)), concat(piece(2), piece(3)));
  }
}

// Shuffles within each run of four lanes; p, q, r, s: 0-3 take from a, 4-7 from b.
template <int p, int q, int r, int s, typename A>
FLATKERN_INLINE A shuffle4(A a, A b) {
  constexpr int n = sizeof(A) / sizeof(a[0]);
  constexpr auto at = [](int k, int lane) { return k < 4 ? lane + k : n + lane + k - 4; };
  if constexpr (n == 4) {
    return __builtin_shufflevector(a, b, at(p, 0), at(q, 0), at(r, 0), at(s, 0));
  } else if constexpr (n == 8) {
    return __builtin_shufflevector(a, b, at(p, 0), at(q, 0), at(r, 0), at(s, 0), at(p, 4), at(q, 4), at(r, 4),
                                   at(s, 4));
  } else {
    return __builtin_shufflevector(a, b, at(p, 0), at(q, 0), at(r, 0), at(s, 0), at(p, 4), at(q, 4), at(r, 4),
                                   at(s, 4), at(p, 8), at(q, 8), at(r, 8), at(s, 8), at(p, 12), at(q, 12),
                                   at(r, 12), at(s, 12));
  }
}

// Transposes each run of `tile` lanes across `tile` vectors; its own inverse.
template <typename T>
FLATKERN_INLINE void transpose(const V<T>* in, V<T>* out) {
  const V<T> r0 = in[0], r1 = in[1];
  if constexpr (Simd<T>::tile == 2) {
    out[0] = __builtin_shufflevector(r0, r1, 0, 2);
    out[1] = __builtin_shufflevector(r0, r1, 1, 3);
  } else {
    const V<T> r2 = in[2], r3 = in[3];
    // unpack pairs, then join halves: the cheapest pair of shuffles for both 4- and 8-byte elements
    if constexpr (sizeof(T) == 4) {
      const V<T> a = shuffle4<0, 4, 1, 5>(r0, r1), b = shuffle4<2, 6, 3, 7>(r0, r1);
      const V<T> c = shuffle4<0, 4, 1, 5>(r2, r3), d = shuffle4<2, 6, 3, 7>(r2, r3);
      out[0] = shuffle4<0, 1, 4, 5>(a, c);
      out[1] = shuffle4<2, 3, 6, 7>(a, c);
      out[2] = shuffle4<0, 1, 4, 5>(b, d);
      out[3] = shuffle4<2, 3, 6, 7>(b, d);
    } else {
      const V<T> a = shuffle4<0, 4, 2, 6>(r0, r1), b = shuffle4<1, 5, 3, 7>(r0, r1);
      const V<T> c = shuffle4<0, 4, 2, 6>(r2, r3), d = shuffle4<1, 5, 3, 7>(r2, r3);
      out[0] = shuffle4<0, 1, 4, 5>(a, c);
      out[1] = shuffle4<0, 1, 4, 5>(b, d);
      out[2] = shuffle4<2, 3, 6, 7>(a, c);
      out[3] = shuffle4<2, 3, 6, 7>(b, d);
    }
  }
}

// out[k] lane s = element offset + k of sample s: `tile` elements of `width` samples, transposed in
// registers.
template <typename T>
FLATKERN_INLINE void load_tile(const T* const* sample, std::int64_t offset, V<T>* out) {
  constexpr int tile = Simd<T>::tile;
  V<T> rows[tile];
#pragma GCC unroll 4
  for (int k = 0; k < tile; ++k) rows[k] = load_pieces<T>(sample, k, offset);
  transpose<T>(rows, out);
}

// The `tile` lanes from p tile on.
template <typename T, int p>
FLATKERN_INLINE typename Simd<T>::P piece(V<T> v) {
  constexpr int tile = Simd<T>::tile, at = p * tile;
  if constexpr (tile == Simd<T>::width) {
    return v;
  } else if constexpr (tile == 2) {
    return __builtin_shufflevector(v, v, at, at + 1);
  } else {
    return __builtin_shufflevector(v, v, at, at + 1, at + 2, at + 3);
  }
}

// The reverse: element offset + k of sample s = in[k] lane s, for the first `lanes` samples.
template <typename T>
FLATKERN_INLINE void store_tile(T* const* sample, std::int64_t offset, const V<T>* in, int lanes) {
  constexpr int tile = Simd<T>::tile, pieces = Simd<T>::width / tile;
  V<T> rows[tile];
  transpose<T>(in, rows);
  auto put = [&](int s, typename Simd<T>::P value) __attribute__((always_inline)) {
    if (s < lanes) __builtin_memcpy(sample[s] + offset, &value, sizeof value);
  };
#pragma GCC unroll 4
  for (int k = 0; k < tile; ++k) {
    put(k, piece<T, 0>(rows[k]));
    if constexpr (pieces > 1) put(k + tile, piece<T, 1>(rows[k]));
    if constexpr (pieces > 2) {
      put(k + 2 * tile, piece<T, 2>(rows[k]));
      put(k + 3 * tile, piece<T, 3>(rows[k]));
    }
  }
}

// Element `offset` of each sample = its lane of v.
template <typename T>
FLATKERN_INLINE void store_element(T* const* sample, std::int64_t offset, V<T> v, int lanes) {
  T values[Simd<T>::width];
  store<T>(values, v);
  for (int s = 0; s < lanes; ++s) sample[s][offset] = values[s];
}

FLATKERN_INLINE V<double> square_root(V<double> x) {
#if FLATKERN_VECTOR_BYTES == 64
  return _mm512_sqrt_pd(x);
#elif FLATKERN_VECTOR_BYTES == 32
  return _mm256_sqrt_pd(x);
#else
  return V<double>{__builtin_sqrt(x[0]), __builtin_sqrt(x[1])};
#endif
}

FLATKERN_INLINE V<float> square_root(V<float> x) {
#if FLATKERN_VECTOR_BYTES == 64
  return _mm512_sqrt_ps(x);
#elif FLATKERN_VECTOR_BYTES == 32
  return _mm256_sqrt_ps(x);
#else
  return V<float>{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
#endif
}

template <typename T>
FLATKERN_INLINE V<T> absolute(V<T> x) {
  return x < T(0) ? -x : x;
}

// Whether any lane of a mask is set.
template <typename I>
FLATKERN_INLINE bool any(I mask) {
  typedef std::int64_t L __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  const L words = reinterpret_cast<L>(mask);
  std::int64_t sum = 0;
  for (int k = 0; k < FLATKERN_VECTOR_BYTES / 8; ++k) sum |= words[k];
  return sum != 0;
}

// Sum of the logarithms of positive normal numbers, lane by lane: exponents add up exactly as integers and
// the mantissas multiply, renormalized each time, so that one logarithm serves the whole sum.
template <typename T>
struct LogSum {
  using S = Simd<T>;
  typename S::I exponent = {};
  V<T> mantissa = broadcast(T(1));

  FLATKERN_INLINE void split() {
    const typename S::I bits = reinterpret_cast<typename S::I>(mantissa);
    exponent += (bits >> S::mantissa_bits) - S::bias;
    typedef typename S::I I;
    const I one = I{} + (decltype(S::mantissa_mask)(S::bias) << S::mantissa_bits);
    mantissa = reinterpret_cast<V<T>>((bits & S::mantissa_mask) | one);
  }

  // x must be positive and normal
  FLATKERN_INLINE void add(V<T> x) {
    typename S::I bits = reinterpret_cast<typename S::I>(x);
    typedef typename S::I I;
    exponent += (bits >> S::mantissa_bits) - S::bias;
    const I one = I{} + (decltype(S::mantissa_mask)(S::bias) << S::mantissa_bits);
    mantissa *= reinterpret_cast<V<T>>((bits & S::mantissa_mask) | one);
    split();
  }

  // log m = 2 atanh((m - 1) / (m + 1)) for m in [sqrt(1/2), sqrt(2)); the odd series in s, s^2 < 0.0295
  FLATKERN_INLINE V<T> value() const {
    const auto high = mantissa > T(1.4142135623730951);
    const V<T> m = high ? mantissa * T(0.5) : mantissa;
    const V<T> e = __builtin_convertvector(exponent - high, V<T>);
    const V<T> s = (m - T(1)) / (m + T(1));
    const V<T> z = s * s;
    constexpr int terms = sizeof(T) == 4 ? 5 : 11;
    V<T> p = broadcast(T(2) / T(2 * terms + 1));
#pragma GCC unroll 16
    for (int k = terms - 1; k >= 1; --k) p = p * z + T(2.0 / (2 * k + 1));
    // ln 2 in two parts: the exponent times the first is exact
    constexpr T hi = sizeof(T) == 4 ? T(0.693359375) : T(6.93147180369123816490e-01);
    constexpr T lo = sizeof(T) == 4 ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
    return e * hi + ((s * z * p + e * lo) + s * T(2));
  }
};

}  // namespace flatkern::cpu::FLATKERN_ISA
