// Gram matrices in double precision, sample after sample.
#pragma once

#include "batch_spd.h"
#include "gram_tile.h"

namespace flatkern::cpu::FLATKERN_ISA {

constexpr std::int64_t kBlockBytes = 24 * 1024;

// Columns worked on at a time: the rows, in double, stay in the nearest cache.
FLATKERN_INLINE std::int64_t block_of(std::int64_t c, std::int64_t d) {
  const std::int64_t fit = kBlockBytes / 8 / (c > 0 ? c : 1) / 16 * 16;
  const std::int64_t block = fit < 128 ? 128 : fit;
  if (d > block) {
    const std::int64_t blocks = (d + block - 1) / block;
    return ((d + blocks - 1) / blocks + 15) / 16 * 16;
  }
  return d > 0 ? (d + 15) / 16 * 16 : 16;
}

// One vector of doubles from as many floats: converted while loading, which spares the shuffle port.
FLATKERN_INLINE V<double> load_wide(const float* x) {
#if FLATKERN_VECTOR_BYTES == 64
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif FLATKERN_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  return V<double>{x[0], x[1]};
#endif
}

// The reverse, rounded to the element type.
FLATKERN_INLINE void store_narrow(float* to, V<double> x) {
#if FLATKERN_VECTOR_BYTES == 64
  _mm256_storeu_ps(to, _mm512_cvtpd_ps(x));
#elif FLATKERN_VECTOR_BYTES == 32
  _mm_storeu_ps(to, _mm256_cvtpd_ps(x));
#else
  to[0] = static_cast<float>(x[0]), to[1] = static_cast<float>(x[1]);
#endif
}

FLATKERN_INLINE void store_narrow(double* to, V<double> x) {
  store<double>(to, x);
}

// n elements of single precision as double; `ahead` as in Rows.
FLATKERN_INLINE void to_double(const float* x, std::int64_t n, double* out, std::int64_t ahead) {
  constexpr int width = Simd<double>::width;
  std::int64_t k = 0;
  for (; k + 2 * width <= n; k += 2 * width) {
    __builtin_prefetch(x + k + ahead, 0, 2);
    store<double>(out + k, load_wide(x + k));
    store<double>(out + k + width, load_wide(x + k + width));
  }
  for (; k < n; ++k) out[k] = x[k];
}

FLATKERN_INLINE void to_double(const double* x, std::int64_t n, double* out, std::int64_t) {
  for (std::int64_t k = 0; k < n; ++k) out[k] = x[k];
}

// One sample's Gram matrix, lower triangle, leading dimension ld. Rows of double with unit stride are read
// where they lie; the others are converted block by block into `pack` (c x block).
template <typename T>
FLATKERN_INLINE void gram_sample(const T* x, const T* next, const Matrices<T>& m, std::int64_t block,
                                 double* pack, double* tail, double* g, int ld) {
  constexpr int width = Simd<double>::width;
  const int c = static_cast<int>(m.rows);
  const bool direct = sizeof(T) == 8 && m.col_stride == 1;
  std::int64_t d0 = 0;
  do {  // once even for d = 0: the Gram matrix is zero then
    const std::int64_t n = m.cols - d0 < block ? m.cols - d0 : block;
    const std::int64_t full = n / width * width, rest = n - full;
    Rows rows{pack, block, full, nullptr, 0};
    if (direct) {
      rows.data = reinterpret_cast<const double*>(x + d0);
      rows.stride = m.row_stride;
      rows.ahead = next - x;
      if (rest) {
        for (int i = 0; i < c; ++i) {
          store<double>(tail + i * width, V<double>{});
          to_double(x + i * m.row_stride + d0 + full, rest, tail + i * width, 0);
        }
        rows.tail = tail;
      }
    } else {
      if (rest) rows.full = full + width;
      for (int i = 0; i < c; ++i) {
        const T* from = x + i * m.row_stride + d0 * m.col_stride;
        double* to = pack + i * block;
        if (rest) store<double>(to + full, V<double>{});
        if (m.col_stride == 1) {
          to_double(from, n, to, next - x);
        } else {
          for (std::int64_t k = 0; k < n; ++k) to[k] = from[k * m.col_stride];
        }
      }
    }
    gram_lower(rows, c, g, ld, d0 > 0);
    d0 += block;
  } while (d0 < m.cols);
}

// The upper triangle of a c x c matrix from its lower one.
FLATKERN_INLINE void mirror(double* g, std::int64_t c) {
  for (std::int64_t i = 0; i < c; ++i) {
    for (std::int64_t j = 0; j < i; ++j) g[j * c + i] = g[i * c + j];
  }
}

template <typename T>
void gram(const Matrices<T>& x, std::int64_t begin, std::int64_t end, double* out) {
  const std::int64_t c = x.rows, block = block_of(c, x.cols);
  const Workspace<double> room(c * block + c * Simd<double>::width);
  double* tail = room.get() + c * block;
  for (std::int64_t n = begin; n < end; ++n) {
    double* g = out + n * c * c;
    gram_sample<T>(x.sample(n), x.sample(n + 1 < end ? n + 1 : n), x, block, room.get(), tail, g,
                   static_cast<int>(c));
    mirror(g, c);
  }
}

}  // namespace flatkern::cpu::FLATKERN_ISA
