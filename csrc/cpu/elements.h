// Vectors of elements of a storage type, computed in its wide type: loads, stores, parts of vectors, and
// stores that pass the caches by.
#pragma once

#include "../common/jets.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace flatkern::cpu::FLATKERN_ISA {

template <typename E>
using W = V<wide_t<E>>;

template <typename E>
constexpr int lanes = Simd<wide_t<E>>::width;

FLATKERN_INLINE V<float> read(const float* p) {
  return load<float>(p);
}
FLATKERN_INLINE V<double> read(const double* p) {
  return load<double>(p);
}
FLATKERN_INLINE V<float> read(const Bf16* p) {
  typedef std::uint16_t Half __attribute__((vector_size(FLATKERN_VECTOR_BYTES / 2)));
  typedef std::uint32_t Word __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return reinterpret_cast<V<float>>(__builtin_convertvector(h, Word) << 16);
}

FLATKERN_INLINE void write(float* p, V<float> v) {
  store<float>(p, v);
}
FLATKERN_INLINE void write(double* p, V<double> v) {
  store<double>(p, v);
}
FLATKERN_INLINE void write(Bf16* p, V<float> v) {
  typedef std::uint16_t Half __attribute__((vector_size(FLATKERN_VECTOR_BYTES / 2)));
  typedef std::uint32_t Word __attribute__((vector_size(FLATKERN_VECTOR_BYTES)));
  const Word word = reinterpret_cast<Word>(v);
  const Word rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const Word nan = Word{} + 0x7fc0u;
  const Half h = __builtin_convertvector(v != v ? nan : rounded, Half);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n lanes from memory, the others `fill`.
template <typename E>
FLATKERN_INLINE W<E> read_some(const E* p, int n, wide_t<E> fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) {
    return reinterpret_cast<V<float>>(_mm512_mask_loadu_ps(reinterpret_cast<__m512>(broadcast<float>(fill)),
                                                           static_cast<__mmask16>((1u << n) - 1), p));
  } else if constexpr (sizeof(E) == 8) {
    return reinterpret_cast<V<double>>(_mm512_mask_loadu_pd(
        reinterpret_cast<__m512d>(broadcast<double>(fill)), static_cast<__mmask8>((1u << n) - 1), p));
  }
#endif
  wide_t<E> room[lanes<E>];
  for (int i = 0; i < lanes<E>; ++i) room[i] = i < n ? widen(p[i]) : fill;
  return load<wide_t<E>>(room);
}

template <typename E>
FLATKERN_INLINE void write_some(E* p, int n, W<E> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
  } else if constexpr (sizeof(E) == 8) {
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), reinterpret_cast<__m512d>(v));
  }
#endif
  wide_t<E> room[lanes<E>];
  store<wide_t<E>>(room, v);
  for (int i = 0; i < n; ++i) narrow(room[i], p + i);
}

// A store that does not fetch the line it overwrites; the address must be a multiple of the vector's size.
template <typename E>
FLATKERN_INLINE void stream(E* p, W<E> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) return _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
  if constexpr (sizeof(E) == 8) return _mm512_stream_pd(p, reinterpret_cast<__m512d>(v));
#elif defined(__AVX__)
  if constexpr (sizeof(E) == 4) return _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
  if constexpr (sizeof(E) == 8) return _mm256_stream_pd(p, reinterpret_cast<__m256d>(v));
#elif defined(__SSE2__)
  if constexpr (sizeof(E) == 4) return _mm_stream_ps(p, reinterpret_cast<__m128>(v));
  if constexpr (sizeof(E) == 8) return _mm_stream_pd(p, reinterpret_cast<__m128d>(v));
#endif
  write(p, v);
}

FLATKERN_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T>
FLATKERN_INLINE T sum_lanes(V<T> v) {
  T room[Simd<T>::width];
  store<T>(room, v);
#pragma GCC unroll 4
  for (int half = Simd<T>::width / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) room[i] += room[i + half];
  }
  return room[0];
}

}  // namespace flatkern::cpu::FLATKERN_ISA
