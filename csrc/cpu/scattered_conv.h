// Convolutions pulled back from scattered cotangents: the lanes of a vector are cotangents, which share their
// places.
#pragma once

#include "../common/scattered_conv.h"
#include "elements.h"
#include "simd.h"

namespace flatkern::cpu::FLATKERN_ISA {

// Channel c's entries as vectors over cotangents [first, first + width), lanes without one zero. start[p]:
// the corner of entry p's patch in the padded input, place[p]: its index; both -1 where it has none.
template <typename T>
FLATKERN_INLINE void gather_entries(const ScatteredConv& s, const T* values, const std::int64_t* index,
                                    std::int64_t first, const T* zeros, const std::int32_t* corner, V<T>* to,
                                    std::int32_t* start, std::int32_t* place) {
  constexpr int width = Simd<T>::width, tile = Simd<T>::tile;
  const T* row[width];
  for (int lane = 0; lane < width; ++lane) {
    row[lane] = first + lane < s.cotangents ? values + (first + lane) * s.channels * s.entries : zeros;
  }
  std::int64_t p = 0;
  for (; p + tile <= s.entries; p += tile) load_tile<T>(row, p, to + p);
  for (; p < s.entries; ++p) {
    T lanes[width];
    for (int lane = 0; lane < width; ++lane) lanes[lane] = row[lane][p];
    to[p] = load<T>(lanes);
  }
  for (p = 0; p < s.entries; ++p) {
    const bool known = index[p] >= 0 && index[p] < s.places();
    place[p] = known ? static_cast<std::int32_t>(index[p]) : -1;
    start[p] = known ? corner[index[p]] : -1;
  }
}

// What every range of samples needs beside its operands, cut out of one piece of memory.
template <typename T>
struct ScatteredScratch {
  V<T>* vectors;  // [channels, entries], or of one channel
  V<T>* sums;     // [padded, in_channels]
  T* zeros;       // [entries]
  T* image;       // [in_channels, padded]
  std::int32_t *corner, *start, *place;
  std::int32_t *waiting, *group;  // [channels]

  static std::int64_t held(const ScatteredConv& s, bool sums_wanted) {
    return sums_wanted ? s.channels * s.entries : s.entries;
  }

  static std::int64_t bytes(const ScatteredConv& s, bool sums_wanted) {
    const std::int64_t large = s.padded() * s.in_channels;
    std::int64_t total = FLATKERN_VECTOR_BYTES * (held(s, sums_wanted) + 1);
    total += sums_wanted ? FLATKERN_VECTOR_BYTES * large : static_cast<std::int64_t>(sizeof(T)) * large;
    total += static_cast<std::int64_t>(sizeof(T)) * s.entries +
             4 * (s.places() + 2 * held(s, sums_wanted) + 2 * s.channels);
    return total + 64;
  }

  ScatteredScratch(const ScatteredConv& s, bool sums_wanted, char* memory) {
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory);
    memory += (FLATKERN_VECTOR_BYTES - address % FLATKERN_VECTOR_BYTES) % FLATKERN_VECTOR_BYTES;
    const std::int64_t large = s.padded() * s.in_channels;
    vectors = reinterpret_cast<V<T>*>(memory);
    memory += FLATKERN_VECTOR_BYTES * held(s, sums_wanted);
    sums = reinterpret_cast<V<T>*>(memory);
    image = reinterpret_cast<T*>(memory);
    memory += sums_wanted ? FLATKERN_VECTOR_BYTES * large : static_cast<std::int64_t>(sizeof(T)) * large;
    zeros = reinterpret_cast<T*>(memory);
    memory += static_cast<std::int64_t>(sizeof(T)) * s.entries;
    corner = reinterpret_cast<std::int32_t*>(memory);
    start = corner + s.places();
    place = start + held(s, sums_wanted);
    waiting = place + held(s, sums_wanted);
    group = waiting + s.channels;
    for (std::int64_t p = 0; p < s.entries; ++p) zeros[p] = T(0);
    for (std::int64_t y = 0; y < s.out_rows; ++y) {
      for (std::int64_t x = 0; x < s.out_cols; ++x) {
        const std::int64_t at = y * s.stride_rows * s.padded_cols() + x * s.stride_cols;
        corner[y * s.out_cols + x] = static_cast<std::int32_t>(at);
      }
    }
  }
};

// to[j] += sum over channels c of vectors[c] w[c, j], for B neighbours j at once.
template <typename T, int B>
FLATKERN_INLINE void add_block(const V<T>* vectors, std::int64_t apart, const T* weight,
                               std::int64_t per_channel, const std::int32_t* group, std::int64_t count,
                               V<T>* to) {
  V<T> sums[B];
#pragma GCC unroll 12
  for (int j = 0; j < B; ++j) sums[j] = to[j];
  for (std::int64_t m = 0; m < count; ++m) {
    const V<T> v = vectors[group[m] * apart];
    const T* w = weight + group[m] * per_channel;
#pragma GCC unroll 12
    for (int j = 0; j < B; ++j) sums[j] += v * w[j];
  }
#pragma GCC unroll 12
  for (int j = 0; j < B; ++j) to[j] = sums[j];
}

template <typename T>
void add_run(const V<T>* vectors, std::int64_t apart, const T* weight, std::int64_t per_channel,
             const std::int32_t* group, std::int64_t count, std::int64_t run, V<T>* to) {
  std::int64_t j = 0;
  for (; j + 12 <= run; j += 12)
    add_block<T, 12>(vectors, apart, weight + j, per_channel, group, count, to + j);
  if (j + 9 <= run) {
    add_block<T, 9>(vectors, apart, weight + j, per_channel, group, count, to + j);
    j += 9;
  }
  for (; j + 4 <= run; j += 4) add_block<T, 4>(vectors, apart, weight + j, per_channel, group, count, to + j);
  for (; j < run; ++j) add_block<T, 1>(vectors, apart, weight + j, per_channel, group, count, to + j);
}

// Cotangents of the input, [n, k, in_channels, rows, cols]; weight [channels, kernel_rows, kernel_cols,
// in_channels].
template <typename T>
void scattered_input(const ScatteredConv& s, const T* values, const std::int64_t* index, const T* weight,
                     std::int64_t begin, std::int64_t end, char* memory, T* out) {
  constexpr int width = Simd<T>::width, tile = Simd<T>::tile;
  const ScatteredScratch<T> scratch(s, true, memory);
  V<T>* const sums = scratch.sums;
  const std::int64_t inner = s.in_channels, size = s.rows * s.cols, per_cotangent = inner * size;
  // neighbours in a row of the kernel lie side by side unless it is dilated
  const std::int64_t run = s.dilation_cols == 1 ? s.kernel_cols * inner : inner;
  const std::int64_t runs = s.dilation_cols == 1 ? 1 : s.kernel_cols;
  for (std::int64_t i = begin; i < end; ++i) {
    for (std::int64_t first = 0; first < s.cotangents; first += width) {
      for (std::int64_t j = 0; j < s.padded() * inner; ++j) sums[j] = V<T>{};
      for (std::int64_t c = 0; c < s.channels; ++c) {
        const std::int64_t plane = (i * s.cotangents * s.channels + c) * s.entries, at = c * s.entries;
        gather_entries<T>(s, values + plane, index + (i * s.channels + c) * s.entries, first, scratch.zeros,
                          scratch.corner, scratch.vectors + at, scratch.start + at, scratch.place + at);
      }
      for (std::int64_t p = 0; p < s.entries; ++p) {
        // entries of one number lie close together (a window of a pool); those at one place add to the same
        // sums
        std::int64_t left = 0;
        for (std::int64_t c = 0; c < s.channels; ++c) {
          if (scratch.start[c * s.entries + p] >= 0) scratch.waiting[left++] = static_cast<std::int32_t>(c);
        }
        while (left) {
          const std::int32_t at = scratch.start[scratch.waiting[0] * s.entries + p];
          std::int64_t count = 0, kept = 0;
          for (std::int64_t j = 0; j < left; ++j) {
            const std::int32_t c = scratch.waiting[j];
            if (scratch.start[c * s.entries + p] == at) {
              scratch.group[count++] = c;
            } else {
              scratch.waiting[kept++] = c;
            }
          }
          left = kept;
          std::int64_t offset = 0;
          for (std::int64_t y = 0; y < s.kernel_rows; ++y) {
            const std::int64_t line = at + y * s.dilation_rows * s.padded_cols();
            for (std::int64_t x = 0; x < runs; ++x, offset += run) {
              add_run<T>(scratch.vectors + p, s.entries, weight + offset, s.taps() * inner, scratch.group,
                         count, run, sums + (line + x * s.dilation_cols) * inner);
            }
          }
        }
      }
      const int lanes = static_cast<int>(s.cotangents - first < width ? s.cotangents - first : width);
      T* sample[width];
      for (int lane = 0; lane < lanes; ++lane)
        sample[lane] = out + (i * s.cotangents + first + lane) * per_cotangent;
      for (std::int64_t ci = 0; ci < inner; ++ci) {
        for (std::int64_t y = 0; y < s.rows; ++y) {
          const V<T>* from = sums + ((y + s.padding_rows) * s.padded_cols() + s.padding_cols) * inner + ci;
          const std::int64_t offset = ci * size + y * s.cols;
          std::int64_t x = 0;
          for (; x + tile <= s.cols; x += tile) {
            V<T> found[tile];
#pragma GCC unroll 4
            for (int j = 0; j < tile; ++j) found[j] = from[(x + j) * inner];
            store_tile<T>(sample, offset + x, found, lanes);
          }
          for (; x < s.cols; ++x) store_element<T>(sample, offset + x, from[x * inner], lanes);
        }
      }
    }
  }
}

// The sum of the squares of R x C entries of the weight's gradients, all lanes apart.
template <typename T, int R, int C>
FLATKERN_INLINE V<T> tap_squares(const V<T>* vectors, const std::int32_t* start, std::int64_t count,
                                 const T* image, std::int64_t line, std::int64_t step) {
  V<T> sums[R][C] = {};
  for (std::int64_t m = 0; m < count; ++m) {
    const V<T> v = vectors[m];
    const T* x = image + start[m];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) sums[r][c] += v * x[r * line + c * step];
    }
  }
  V<T> total = {};
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) total += sums[r][c] * sums[r][c];
  }
  return total;
}

template <typename T>
V<T> kernel_squares(const ScatteredConv& s, const V<T>* vectors, const std::int32_t* start,
                    std::int64_t count, const T* image) {
  const std::int64_t line = s.dilation_rows * s.padded_cols(), step = s.dilation_cols;
  V<T> total = {};
  for (std::int64_t y = 0; y < s.kernel_rows; y += 3) {
    for (std::int64_t x = 0; x < s.kernel_cols; x += 3) {
      const std::int64_t down = s.kernel_rows - y < 3 ? s.kernel_rows - y : 3;
      const std::int64_t across = s.kernel_cols - x < 3 ? s.kernel_cols - x : 3;
      const T* at = image + y * line + x * step;
      switch (down * 4 + across) {
        case 5:
          total += tap_squares<T, 1, 1>(vectors, start, count, at, line, step);
          break;
        case 6:
          total += tap_squares<T, 1, 2>(vectors, start, count, at, line, step);
          break;
        case 7:
          total += tap_squares<T, 1, 3>(vectors, start, count, at, line, step);
          break;
        case 9:
          total += tap_squares<T, 2, 1>(vectors, start, count, at, line, step);
          break;
        case 10:
          total += tap_squares<T, 2, 2>(vectors, start, count, at, line, step);
          break;
        case 11:
          total += tap_squares<T, 2, 3>(vectors, start, count, at, line, step);
          break;
        case 13:
          total += tap_squares<T, 3, 1>(vectors, start, count, at, line, step);
          break;
        case 14:
          total += tap_squares<T, 3, 2>(vectors, start, count, at, line, step);
          break;
        default:
          total += tap_squares<T, 3, 3>(vectors, start, count, at, line, step);
          break;
      }
    }
  }
  return total;
}

// Of all k gradients of a sample together: squared norms of the weight's and the bias's, [n] each, and of the
// cotangents by place, [n, places].
template <typename T>
void scattered_norms(const ScatteredConv& s, const T* values, const std::int64_t* index, const T* input,
                     std::int64_t begin, std::int64_t end, char* memory, double* weight_sq, double* bias_sq,
                     double* place_sq) {
  constexpr int width = Simd<T>::width;
  const ScatteredScratch<T> scratch(s, false, memory);
  T* const image = scratch.image;
  const std::int64_t padded = s.padded(), size = s.rows * s.cols;
  for (std::int64_t j = 0; j < padded * s.in_channels; ++j) image[j] = T(0);
  for (std::int64_t i = begin; i < end; ++i) {
    for (std::int64_t ci = 0; ci < s.in_channels; ++ci) {
      for (std::int64_t y = 0; y < s.rows; ++y) {
        const T* from = input + (i * s.in_channels + ci) * size + y * s.cols;
        T* to = image + ci * padded + (y + s.padding_rows) * s.padded_cols() + s.padding_cols;
        for (std::int64_t x = 0; x < s.cols; ++x) to[x] = from[x];
      }
    }
    double of_weight = 0, of_bias = 0;
    double* of_place = place_sq + i * s.places();
    for (std::int64_t t = 0; t < s.places(); ++t) of_place[t] = 0;
    for (std::int64_t first = 0; first < s.cotangents; first += width) {
      for (std::int64_t c = 0; c < s.channels; ++c) {
        const std::int64_t plane = (i * s.cotangents * s.channels + c) * s.entries;
        gather_entries<T>(s, values + plane, index + (i * s.channels + c) * s.entries, first, scratch.zeros,
                          scratch.corner, scratch.vectors, scratch.start, scratch.place);
        std::int64_t kept = 0;
        V<T> sum = {};
        for (std::int64_t p = 0; p < s.entries; ++p) {
          if (scratch.place[p] < 0) continue;
          const V<T> v = scratch.vectors[p];
          sum += v;
          of_place[scratch.place[p]] += static_cast<double>(sum_lanes<T>(v * v));
          scratch.vectors[kept] = v;
          scratch.start[kept++] = scratch.start[p];
        }
        of_bias += static_cast<double>(sum_lanes<T>(sum * sum));
        V<T> squares = {};
        for (std::int64_t ci = 0; ci < s.in_channels; ++ci) {
          squares += kernel_squares<T>(s, scratch.vectors, scratch.start, kept, image + ci * padded);
        }
        of_weight += static_cast<double>(sum_lanes<T>(squares));
      }
    }
    weight_sq[i] = of_weight;
    bias_sq[i] = of_bias;
  }
}

template <typename T>
std::int64_t scattered_bytes(const ScatteredConv& s, bool sums) {
  return ScatteredScratch<T>::bytes(s, sums);
}

}  // namespace flatkern::cpu::FLATKERN_ISA
