// From memory to lanes and back: the lower triangles of `width` samples, their log-determinants, inverses.
#pragma once

#include <stdlib.h>

#include "elements.h"
#include "kernels.h"
#include "ldl.h"
#include "spd_inverse.h"

namespace flatkern::cpu::FLATKERN_ISA {

// Aligned memory for one call, freed on return.
template <typename T>
class Workspace {
 public:
  explicit Workspace(std::int64_t count) {
    const size_t bytes = ((static_cast<size_t>(count) * sizeof(T) + 63) / 64 + 1) * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data_) __builtin_trap();  // a few hundred kilobytes at most: nothing sensible is left to do
  }
  ~Workspace() { free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Vectors a factorization of size c needs: triangle, reciprocal pivots, the scaled rows of a panel.
inline __attribute__((always_inline)) std::int64_t ldl_vectors(std::int64_t c) {
  return packed(c, 0) + c + 4 * c;
}

// load_lower for c x c < tile x tile numbers that lie side by side, which are read as tiles of one long row.
template <typename T, int c>
FLATKERN_INLINE V<T> load_lower_flat(const T* const* sample, V<T>* __restrict a) {
  constexpr int tile = Simd<T>::tile, count = c * c;
  static_assert(count >= tile);
  const V<T> zero = {};
  V<T> bad = {}, all[count];
#pragma GCC unroll 4
  for (int e = 0; e < count; e += tile) {
    const int first = e + tile <= count ? e : count - tile;
    V<T> t[tile];
    load_tile<T>(sample, first, t);
#pragma GCC unroll 4
    for (int k = 0; k < tile; ++k) all[first + k] = t[k];
  }
#pragma GCC unroll 4
  for (int i = 0; i < c; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j <= i; ++j) {
      a[packed(i, j)] = all[i * c + j];
      bad += all[i * c + j] * zero;
    }
  }
  return bad;
}

// Fills `a` with the packed lower triangles of the samples. Lane by lane the result is 0 where every element
// is finite and NaN where one is not.
template <typename T>
FLATKERN_INLINE V<T> load_lower(const T* const* sample, int c, std::int64_t row_stride,
                                std::int64_t col_stride, V<T>* __restrict a) {
  constexpr int tile = Simd<T>::tile;
  const V<T> zero = {};
  V<T> bad = {};
  if (c < tile && col_stride == 1 && row_stride == c) {
    if (c == 2) return load_lower_flat<T, 2>(sample, a);
    if (c == 3) return load_lower_flat<T, 3>(sample, a);
  }
  if (c >= tile && col_stride == 1) {
    for (int i = 0; i < c; ++i) {
      V<T>* row = a + packed(i, 0);
      for (int j = 0; j <= i; j += tile) {
        // the last tile moves back inside the row: never a read past the matrix
        const int first = j + tile <= c ? j : c - tile;
        V<T> t[tile];
        load_tile<T>(sample, i * row_stride + first, t);
#pragma GCC unroll 4
        for (int k = 0; k < tile; ++k) {
          if (first + k <= i) {
            row[first + k] = t[k];
            bad += t[k] * zero;
          }
        }
      }
    }
  } else if (c >= tile && row_stride == 1) {
    for (int j = 0; j < c; ++j) {
      for (int i = j; i < c; i += tile) {
        const int first = i + tile <= c ? i : c - tile;
        V<T> t[tile];
        load_tile<T>(sample, j * col_stride + first, t);
#pragma GCC unroll 4
        for (int k = 0; k < tile; ++k) {
          if (first + k >= j) {
            a[packed(first + k, j)] = t[k];
            bad += t[k] * zero;
          }
        }
      }
    }
  } else {
    for (int i = 0; i < c; ++i) {
      for (int j = 0; j <= i; ++j) {
        const std::int64_t offset = i * row_stride + j * col_stride;
        T lanes[Simd<T>::width];
        for (int s = 0; s < Simd<T>::width; ++s) lanes[s] = sample[s][offset];
        const V<T> v = load<T>(lanes);
        a[packed(i, j)] = v;
        bad += v * zero;
      }
    }
  }
  return bad;
}

// -inf where a pivot was no good, NaN where the input was not finite.
template <typename T>
FLATKERN_INLINE V<T> logdet_of(const Pivots<T>& pivots, V<T> bad) {
  const V<T> value = pivots.good ? pivots.log.value() : broadcast(-T(__builtin_inf()));
  return value + bad;
}

template <typename T>
FLATKERN_INLINE void store_lanes(T* out, V<T> v, int lanes) {
  if (lanes == Simd<T>::width) {
    store<T>(out, v);
  } else {
    T values[Simd<T>::width];
    store<T>(values, v);
    for (int s = 0; s < lanes; ++s) out[s] = values[s];
  }
}

// Pointers to samples first .. first + lanes - 1; the lanes left over repeat the last one.
template <typename T>
FLATKERN_INLINE int take_samples(const Matrices<T>& m, std::int64_t first, std::int64_t end,
                                 const T** sample) {
  constexpr int width = Simd<T>::width;
  const int lanes = end - first < width ? static_cast<int>(end - first) : width;
  if (m.batch.dims == 1 && lanes == width) {
    const std::int64_t stride = m.batch.stride[0];
    const T* from = m.data + first * stride;
    for (int s = 0; s < width; ++s) sample[s] = from + s * stride;
    return lanes;
  }
  for (int s = 0; s < width; ++s) sample[s] = m.sample(first + (s < lanes ? s : lanes - 1));
  return lanes;
}

// Asks for the samples after those at hand: the next `width` of them, where they lie in one run.
template <typename T>
FLATKERN_INLINE void prefetch_next(const Matrices<T>& m, std::int64_t first, std::int64_t end) {
  constexpr int width = Simd<T>::width;
  constexpr std::int64_t line = 64, most = 1024;
  const std::int64_t step = m.batch.dims == 1 ? m.batch.stride[0] * static_cast<std::int64_t>(sizeof(T)) : 0;
  if (first + 2 * width > end || step <= 0) return;
  const char* next = reinterpret_cast<const char*>(m.data) + (first + width) * step;
  const std::int64_t lines = width * step / line;
  for (std::int64_t k = 0; k < (lines < most ? lines : most); ++k) __builtin_prefetch(next + k * line, 0, 2);
}

template <typename T>
void spd_logdet(const Matrices<T>& g, std::int64_t begin, std::int64_t end, T* out) {
  const int c = static_cast<int>(g.rows);
  const Workspace<V<T>> room(ldl_vectors(c));
  V<T>* a = room.get();
  V<T>* inverse = a + packed(c, 0);
  const T tolerance = spd_tolerance<T>(c);
  for (std::int64_t first = begin; first < end; first += Simd<T>::width) {
    const T* sample[Simd<T>::width];
    const int lanes = take_samples(g, first, end, sample);
    prefetch_next(g, first, end);
    const V<T> bad = load_lower<T>(sample, c, g.row_stride, g.col_stride, a);
    Pivots<T> pivots(tolerance);
    ldl<T>(a, c, c <= 8 ? nullptr : inverse, inverse + c, pivots);
    store_lanes<T>(out + first, logdet_of(pivots, bad), lanes);
  }
}

// Bytes of matrices from which stores pass the caches by: those of several samples at once are too many
// streams for the processor to fetch ahead the lines that they overwrite.
constexpr std::int64_t kManyMatrices = 4ll << 20;

// Matrices of a group of samples before they go past the caches. Where they lie a power of two apart, in few
// sets of the cache, they are spread by a vector each.
template <typename T>
struct Staged {
  std::int64_t square, pitch;

  explicit FLATKERN_INLINE Staged(std::int64_t c)
      : square(c * c), pitch(square * sizeof(T) % 1024 == 0 ? square + Simd<T>::width : square) {}

  FLATKERN_INLINE std::int64_t vectors() const { return pitch; }

  // `to` is a multiple of a vector's size, and so is every spread matrix.
  FLATKERN_INLINE void stream_to(T* to, const T* from, std::int64_t count) const {
    const bool spread = pitch != square;
    const std::int64_t runs = spread ? count : 1, length = spread ? square : count * square;
    for (std::int64_t r = 0; r < runs; ++r) {
      const T* row = from + r * pitch;
      std::int64_t k = 0;
      for (; k + Simd<T>::width <= length; k += Simd<T>::width)
        stream<T>(to + r * length + k, load<T>(row + k));
      for (; k < length; ++k) to[r * length + k] = row[k];
    }
  }
};

// How many matrices further on one begins at a multiple of a vector's size; -1: none does.
template <typename T>
FLATKERN_INLINE int until_aligned(const T* matrix, std::int64_t square) {
  for (int k = 0; k < Simd<T>::width; ++k) {
    if (reinterpret_cast<std::uintptr_t>(matrix + k * square) % sizeof(V<T>) == 0) return k;
  }
  return -1;
}

// weight[n] times the inverse: the derivative of the log-determinants. Where a matrix is not numerically
// positive definite, or not finite, there is none: zeros where the weight is zero, else NaN.
template <typename T>
void spd_pullback(const Matrices<T>& g, const T* weight, std::int64_t begin, std::int64_t end, T* out) {
  const int c = static_cast<int>(g.rows);
  const Staged<T> stage(c);
  const std::int64_t square = stage.square;
  const bool many = g.batch.count() * square * static_cast<std::int64_t>(sizeof(T)) >= kManyMatrices;
  const Workspace<V<T>> room(ldl_vectors(c) + inverse_vectors(c) + stage.vectors());
  V<T>* a = room.get();
  V<T>* inverse = a + packed(c, 0);
  V<T>* m = a + ldl_vectors(c);
  T* staged = reinterpret_cast<T*>(m + inverse_vectors(c));
  const T tolerance = spd_tolerance<T>(c);
  int lanes;
  for (std::int64_t first = begin; first < end; first += lanes) {
    const T* sample[Simd<T>::width];
    T* to[Simd<T>::width];
    T weights[Simd<T>::width];
    T* const group = out + first * square;
    const int ahead = many ? until_aligned(group, square) : 0;
    const bool past = many && ahead == 0;
    lanes = take_samples(g, first, ahead > 0 && first + ahead < end ? first + ahead : end, sample);
    for (int s = 0; s < Simd<T>::width; ++s) {
      const std::int64_t at = s < lanes ? s : lanes - 1;
      to[s] = past ? staged + at * stage.pitch : group + at * square;
      weights[s] = weight[first + at];
    }
    prefetch_next(g, first, end);
    const V<T> bad = load_lower<T>(sample, c, g.row_stride, g.col_stride, a);
    Pivots<T> pivots(tolerance);
    ldl<T>(a, c, inverse, inverse + c, pivots);
    const auto usable = pivots.good & (bad == T(0));
    const V<T> w = load<T>(weights);
    const V<T> scale = usable ? w : (w == T(0) ? V<T>{} : broadcast(T(__builtin_nan(""))));
    store_inverse<T>(a, c, inverse, usable, scale, m, to);
    if (past) stage.stream_to(group, staged, lanes);
  }
  if (many) stream_end();
}

}  // namespace flatkern::cpu::FLATKERN_ISA
