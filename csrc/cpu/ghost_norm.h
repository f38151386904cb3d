// Squared norms of gamma_k = sum_t g_kt a_t^T, tile by tile: neither gamma nor a T x T matrix is ever stored.
//
//   explicit: sum over tiles of gamma of their squares, T being the depth of the product;
//   Gram:     sum over tiles (t, s), s >= t, of (A A^T)_ts (G_k G_k^T)_ts, twice above the diagonal; the
//   depth are the
//             features, and a tile of A A^T serves all cotangents.
//
// Either way a matrix product whose result is consumed in registers. Operands are packed into panels of
// `kLanes` rows, [depth][lane], which serve as the left and as the right factor: kRows x kLanes results are
// kept in registers.
#pragma once

#include <cstdlib>

#include "../common/ghost.h"
#include "simd.h"

namespace flatkern::cpu::FLATKERN_ISA {

template <int n>
struct Count {
  static constexpr int value = n;
};

template <typename T>
struct GhostTile {
  static constexpr int width = Simd<T>::width;
  static constexpr int vectors = FLATKERN_VECTOR_BYTES >= 32 ? 3 : 2;
  static constexpr int lanes = vectors * width;                     // of a panel
  static constexpr int rows = FLATKERN_VECTOR_BYTES == 64 ? 8 : 4;  // of a left factor; divides `lanes`
  static constexpr int few = rows / 4;                              // of what is left over at the end
  static constexpr int panels = 1152 / static_cast<int>(sizeof(T)) / lanes;
  static constexpr int side = panels * lanes;  // rows and columns of a tile
  static_assert(lanes % rows == 0 && side % lanes == 0, "panels must fit");
  static constexpr int depth = 128;  // packed at a time
};

// Rows [first, first + count) of an operand's axis as a tile packs them.
template <typename T>
struct GhostRows {
  const T* data;       // of the sample
  const Batch* rows;   // the axis that the tile's rows or columns run along
  const Batch* depth;  // the axis that is summed over
  std::int64_t first;
  int count;
};

// Offsets of [first, first + count) along an axis.
inline void offsets_along(const Batch& axis, std::int64_t first, int count, std::int64_t* out) {
  if (axis.dims <= 1) {
    const std::int64_t stride = axis.dims ? axis.stride[0] : 0;
    for (int k = 0; k < count; ++k) out[k] = (first + k) * stride;
    return;
  }
  const int last = axis.dims - 1;
  std::int64_t inner = first % axis.size[last];
  std::int64_t at = axis.offset(first);
  for (int k = 0; k < count; ++k) {
    out[k] = at;
    at += axis.stride[last];
    if (++inner == axis.size[last]) {
      inner = 0;
      if (k + 1 < count) at = axis.offset(first + k + 1);
    }
  }
}

template <int count>
FLATKERN_INLINE bool side_by_side(const std::int64_t* at) {
  bool run = true;
#pragma GCC unroll 16
  for (int l = 1; l < count; ++l) run = run && at[l] - at[0] == l;
  return run;
}

// `width` depths of up to `width` rows, transposed in registers from a copy: rows may lie a power of two
// apart, in one set of the cache. Depths are copied by vectors, by quads or one by one, as they lie.
template <typename T>
FLATKERN_INLINE void pack_transposed(const T* data, const std::int64_t* at, int have,
                                     const std::int64_t* deep, T* copy, const T* const* line, T* out) {
  using G = GhostTile<T>;
  constexpr int width = G::width, quad = Simd<T>::tile;
  if (side_by_side<width>(deep)) {
    for (int l = 0; l < have; ++l) store<T>(copy + l * width, load<T>(data + at[l] + deep[0]));
  } else {
    for (int q = 0; q < width; q += quad) {
      if (side_by_side<quad>(deep + q)) {
        for (int l = 0; l < have; ++l)
          __builtin_memcpy(copy + l * width + q, data + at[l] + deep[q], quad * sizeof(T));
        continue;
      }
      for (int l = 0; l < have; ++l) {
#pragma GCC unroll 4
        for (int r = 0; r < quad; ++r) copy[l * width + q + r] = data[at[l] + deep[q + r]];
      }
    }
  }
  for (int q = 0; q < width; q += quad) {
    V<T> tile[quad];
    load_tile<T>(line, q, tile);
#pragma GCC unroll 4
    for (int r = 0; r < quad; ++r) store<T>(out + (q + r) * G::lanes, tile[r]);
  }
}

// One panel [kc][lanes] from rows at `row` and depths at `deep`; lanes from `count` on are zero.
template <typename T>
inline void pack_panel(const T* data, const std::int64_t* row, int count, const std::int64_t* deep, int kc,
                       T* to) {
  using G = GhostTile<T>;
  constexpr int width = G::width, quad = Simd<T>::tile;
  const bool by_depth = kc >= width && (side_by_side<quad>(deep) || count < quad || !side_by_side<quad>(row));
  for (int begin = 0; begin < G::lanes; begin += width) {
    const int have = count - begin < width ? count - begin : width;
    const std::int64_t* at = row + begin;
    T* out = to + begin;
    if (have < width) {
      for (int k = 0; k < kc; ++k) store<T>(out + k * G::lanes, V<T>{});
      if (have <= 0) continue;
    }
    int k = 0;
    if (by_depth) {
      T copy[width * width] = {};
      const T* line[width];
      for (int l = 0; l < width; ++l) line[l] = copy + l * width;
      for (; k + width <= kc; k += width)
        pack_transposed<T>(data, at, have, deep + k, copy, line, out + k * G::lanes);
    }
    // rows that lie side by side together, for all depths that are left
    for (int l = 0; l < have && k < kc;) {
      const bool run = l + quad <= have && side_by_side<quad>(at + l);
      const T* from = data + at[l];
      if (run) {
        for (int d = k; d < kc; ++d)
          __builtin_memcpy(out + d * G::lanes + l, from + deep[d], quad * sizeof(T));
      } else {
        for (int d = k; d < kc; ++d) out[d * G::lanes + l] = from[deep[d]];
      }
      l += run ? quad : 1;
    }
  }
}

template <typename T>
inline void pack(const GhostRows<T>& x, std::int64_t k0, int kc, T* to) {
  using G = GhostTile<T>;
  std::int64_t row[G::side], deep[G::depth];
  offsets_along(*x.rows, x.first, x.count, row);
  offsets_along(*x.depth, k0, kc, deep);
  if (x.rows->dims == 0 || (x.rows->dims == 1 && x.rows->stride[0] == 1)) {  // in the order of memory
    for (int k = 0; k < kc; ++k) {
      const T* from = x.data + row[0] + deep[k];
      T* out = to + k * G::lanes;
      int r = 0;
      for (; r + G::lanes <= x.count; r += G::lanes) {
        for (int v = 0; v < G::lanes; v += G::width) store<T>(out + r * G::depth + v, load<T>(from + r + v));
      }
      for (int l = 0; r < x.count && l < G::lanes; ++l) {
        out[r * G::depth + l] = r + l < x.count ? from[r + l] : T(0);
      }
    }
    return;
  }
  for (int p = 0; p * G::lanes < x.count; ++p) {
    const int left = x.count - p * G::lanes;
    pack_panel<T>(x.data, row + p * G::lanes, left < G::lanes ? left : G::lanes, deep, kc,
                  to + p * G::lanes * G::depth);
  }
}

// R x C vectors of products, added to those of earlier depths where `more`.
template <typename T, int R, int C>
FLATKERN_INLINE void ghost_micro(const T* left, const T* right, int kc, const T* so_far, V<T> (&acc)[R][C]) {
  using G = GhostTile<T>;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) acc[r][c] = so_far ? load<T>(so_far + r * G::side + c * G::width) : V<T>{};
  }
  for (int k = 0; k < kc; ++k) {
    V<T> b[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) b[c] = load<T>(right + k * G::lanes + c * G::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T a = left[k * G::lanes + r];
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) acc[r][c] += a * b[c];
    }
  }
}

template <typename T>
FLATKERN_INLINE double wide_sum(V<T> v) {
  T lane[Simd<T>::width];
  store<T>(lane, v);
  double sum = 0;
  for (int l = 0; l < Simd<T>::width; ++l) sum += static_cast<double>(lane[l]);
  return sum;
}

// What becomes of a tile's products once the depth is exhausted.
enum class Finish { store, squares, weighted };

// Rows of cotangents side by side: row r of the tile belongs to cotangent (first + r) / d_out.
struct SquareSums {
  std::int64_t first, d_out, samples;
  double* out;  // of this sample, cotangents `samples` apart
};

template <typename T, int R, int C, Finish finish>
FLATKERN_INLINE void ghost_step(const T* left, const T* right, int kc, bool more, T* tile, const T* weights,
                                int i, int j, int rows, const SquareSums* sums, std::int64_t above,
                                double* total) {
  using G = GhostTile<T>;
  V<T> acc[R][C];
  T* at = tile + i * G::side + j;
  ghost_micro<T, R, C>(left, right, kc, more ? at : nullptr, acc);
  if constexpr (finish == Finish::store) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) store<T>(at + r * G::side + c * G::width, acc[r][c]);
    }
  } else if constexpr (finish == Finish::squares) {
    std::int64_t k = (sums->first + i) / sums->d_out, next = (k + 1) * sums->d_out - sums->first - i;
    V<T> sum = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r == next && r < rows) {
        sums->out[k * sums->samples] += wide_sum<T>(sum);
        sum = V<T>{};
        ++k, next += sums->d_out;
      }
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) sum += acc[r][c] * acc[r][c];
    }
    sums->out[k * sums->samples] += wide_sum<T>(sum);
  } else {
    const T* other = weights + i * G::side + j;
    V<T> sum = {};
    // `above`: column minus row, in the whole matrix, of this block's first entry
    if (above >= R) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) sum += acc[r][c] * load<T>(other + r * G::side + c * G::width);
      }
      *total += 2 * wide_sum<T>(sum);
      return;
    }
    typedef typename Simd<T>::I I;
    I column;
    for (int l = 0; l < G::width; ++l) column[l] = l;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) {
        const I over = column + static_cast<decltype(Simd<T>::mantissa_mask)>(above + c * G::width - r);
        const V<T> value = acc[r][c] * load<T>(other + r * G::side + c * G::width);
        sum += over > 0 ? value : over == 0 ? value * T(0.5) : V<T>{};
      }
    }
    *total += 2 * wide_sum<T>(sum);
  }
}

// One step of depth of a tile: all its blocks, or those that reach the diagonal and above. `offset`: column
// minus row of the tile's first entry in a symmetric matrix, where only entries on and above the diagonal are
// wanted.
template <typename T, Finish finish>
inline void ghost_tile(const T* left, int rows, const T* right, int cols, int kc, bool more, T* tile,
                       const T* weights, const SquareSums* sums, bool symmetric, std::int64_t offset,
                       double* total) {
  using G = GhostTile<T>;
  for (int j = 0; j < cols; j += G::lanes) {
    const T* b = right + j * G::depth;
    const int width = cols - j;
    for (int i = 0; i < rows; i += G::rows) {
      const std::int64_t above = offset + j - i;
      if (symmetric && above + (width < G::lanes ? width : G::lanes) <= 0)
        break;  // wholly below the diagonal
      const T* a = left + i / G::lanes * G::lanes * G::depth + i % G::lanes;
      const std::int64_t reach = symmetric ? above : 1 << 20;
      const auto step = [&](auto height, auto vectors) __attribute__((always_inline)) {
        ghost_step<T, height.value, vectors.value, finish>(a, b, kc, more, tile, weights, i, j, rows - i,
                                                           sums, reach, total);
      };
      const auto block = [&](auto vectors) __attribute__((always_inline)) {
        rows - i > G::few ? step(Count<G::rows>{}, vectors) : step(Count<G::few>{}, vectors);
      };
      if (width > 2 * G::width) {
        block(Count<G::vectors>{});
      } else if (width > G::width) {
        block(Count<2>{});
      } else {
        block(Count<1>{});
      }
    }
  }
}

template <typename T>
struct GhostRoom {
  T *left, *right, *tile, *weights;
};

// Products of two ranges of rows, chunk of depth by chunk; `finish` is applied to the last.
template <typename T, Finish finish>
inline void ghost_product(const GhostRows<T>& x, const GhostRows<T>& y, std::int64_t depth,
                          const GhostRoom<T>& room, T* tile, const SquareSums* sums, bool symmetric,
                          double* total) {
  using G = GhostTile<T>;
  const bool same = symmetric && x.first == y.first;
  for (std::int64_t k0 = 0; k0 < depth; k0 += G::depth) {
    const int kc = static_cast<int>(depth - k0 < G::depth ? depth - k0 : G::depth);
    pack(y, k0, kc, room.right);
    if (!same) pack(x, k0, kc, room.left);
    const T* left = same ? room.right : room.left;
    if (k0 + kc == depth) {
      ghost_tile<T, finish>(left, x.count, room.right, y.count, kc, k0 > 0, tile, room.weights, sums,
                            symmetric, y.first - x.first, total);
    } else {
      ghost_tile<T, Finish::store>(left, x.count, room.right, y.count, kc, k0 > 0, tile, room.weights, sums,
                                   symmetric, y.first - x.first, total);
    }
  }
}

// The cotangents' rows (k, o) as one axis.
template <typename T>
inline Batch ghost_rows(const GhostInput<T>& x) {
  Batch axis;
  axis.push(x.cotangents, x.cotangent_stride);
  for (int k = 0; k < x.g.features.dims; ++k) axis.push(x.g.features.size[k], x.g.features.stride[k]);
  return axis;
}

template <typename T>
inline void ghost_explicit(const GhostInput<T>& x, std::int64_t i, std::int64_t n, const GhostRoom<T>& room,
                           double* out) {
  using G = GhostTile<T>;
  const Batch rows = ghost_rows(x);
  const T* a = x.a.data + x.a.samples.offset(i);
  const T* g = x.g.data + x.g.samples.offset(i);
  const std::int64_t total = x.cotangents * x.d_out;
  for (std::int64_t r = 0; r < total; r += G::side) {
    const int height = static_cast<int>(total - r < G::side ? total - r : G::side);
    const SquareSums sums{r, x.d_out, n, out + i};
    for (std::int64_t c = 0; c < x.d_in; c += G::side) {
      const int width = static_cast<int>(x.d_in - c < G::side ? x.d_in - c : G::side);
      ghost_product<T, Finish::squares>({g, &rows, &x.g.positions, r, height},
                                        {a, &x.a.features, &x.a.positions, c, width}, x.positions, room,
                                        room.tile, &sums, false, nullptr);
    }
  }
}

template <typename T>
inline void ghost_gram(const GhostInput<T>& x, std::int64_t i, std::int64_t n, const GhostRoom<T>& room,
                       double* out) {
  using G = GhostTile<T>;
  const T* a = x.a.data + x.a.samples.offset(i);
  for (std::int64_t t = 0; t < x.positions; t += G::side) {
    const int height = static_cast<int>(x.positions - t < G::side ? x.positions - t : G::side);
    for (std::int64_t s = t; s < x.positions; s += G::side) {
      const int width = static_cast<int>(x.positions - s < G::side ? x.positions - s : G::side);
      ghost_product<T, Finish::store>({a, &x.a.positions, &x.a.features, t, height},
                                      {a, &x.a.positions, &x.a.features, s, width}, x.d_in, room,
                                      room.weights, nullptr, true, nullptr);
      for (std::int64_t k = 0; k < x.cotangents; ++k) {
        const T* g = x.g.data + x.g.samples.offset(i) + k * x.cotangent_stride;
        ghost_product<T, Finish::weighted>({g, &x.g.positions, &x.g.features, t, height},
                                           {g, &x.g.positions, &x.g.features, s, width}, x.d_out, room,
                                           room.tile, nullptr, true, out + k * n + i);
      }
    }
  }
}

// out[k, i] = |gamma_ki|^2 for samples [begin, end).
template <typename T>
void ghost_norm(const GhostInput<T>& x, bool formed, std::int64_t begin, std::int64_t end, double* out) {
  using G = GhostTile<T>;
  const std::int64_t n = x.a.samples.count();
  for (std::int64_t k = 0; k < x.cotangents; ++k) {
    for (std::int64_t i = begin; i < end; ++i) out[k * n + i] = 0;
  }
  if (x.positions == 0 || x.d_in == 0 || x.d_out == 0 || x.cotangents == 0 || begin >= end) return;
  // at most 0.94 MiB (float) or 0.61 MiB whatever the sizes, less for small ones: fresh pages cost more than
  // a product
  const auto panels = [](std::int64_t size) {
    const std::int64_t most = size < G::side ? size : G::side;
    return (most + G::lanes - 1) / G::lanes * G::lanes;
  };
  const std::int64_t rows = panels(formed ? x.cotangents * x.d_out : x.positions);
  const std::int64_t cols = panels(formed ? x.d_in : x.positions);
  const std::int64_t left = formed || x.positions > G::side ? rows * G::depth : 0;
  const std::int64_t right = cols * G::depth, tile = rows * G::side, weights = formed ? 0 : tile;
  const auto bytes = static_cast<std::size_t>(left + right + tile + weights) * sizeof(T);
  T* const memory = static_cast<T*>(std::malloc(bytes + 64));
  if (!memory) __builtin_trap();
  T* const room = reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64);
  const GhostRoom<T> rooms{room, room + left, room + left + right, room + left + right + tile};
  for (std::int64_t i = begin; i < end; ++i) {
    formed ? ghost_explicit(x, i, n, rooms, out) : ghost_gram(x, i, n, rooms, out);
  }
  std::free(memory);
}

}  // namespace flatkern::cpu::FLATKERN_ISA
