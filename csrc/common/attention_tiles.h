// Products of tiles for attention, by a team of 256 threads in a grid of 16 x 16: A B^T of 64 rows with 64
// others into registers, and W B of a 64 x 64 tile with 64 rows. The code is one for both sides: on a GPU a
// team is a block, on the host one thread takes the 256 parts in turn between one barrier and the next.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_math.h"

namespace flatkern::attention {

constexpr int kThreads = 256, kSide = 16, kTile = 64, kPart = kTile / kSide;
constexpr int kStrip = 16;                                     // rows of B at a time in W B
constexpr int kFours = static_cast<int>(kAttentionWidth) / 4;  // groups of four columns in the widest row
constexpr int kOwnFours = kFours / kSide;                      // of these a thread's

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// A tile in shared memory; the pad spreads what threads with other rows read over the banks.
template <typename T>
struct Tile {
  Four<T> row[kTile][kTile / 4 + 1];

  FLATKERN_HD T& at(int r, int c) { return row[r][c / 4].v[c % 4]; }
};

template <typename T>
struct Room {
  Tile<T> tile[2];
  Four<T> strip[kStrip][kFours];
  T part[kTile][4], part_sum[kTile][4];
  T top[kTile], sum[kTile], factor[kTile];
};

// A thread's own: parts [4, 4] of four products and a sum, at rows y + 16 a and columns x + 16 c; parts of
// two results of 64 rows, at rows y + 16 a and columns 4 x + 64 c + 0 .. 3; a number for each of its rows.
template <typename T>
struct Registers {
  T product[4][kPart][kPart];
  T sum[kPart][kPart];
  Four<T> out[2][kPart][kOwnFours];
  T row[kPart];
};

// The order of the threads makes no difference, unless one reads what another writes in the same phase.
template <typename T>
struct HostTeam {
  bool backwards = false;
  std::vector<Registers<T>> own = std::vector<Registers<T>>(kThreads);

  template <typename F>
  void phase(const F& f) {
    for (int k = 0; k < kThreads; ++k) {
      const int thread = backwards ? kThreads - 1 - k : k;
      f(thread, own[static_cast<std::size_t>(thread)]);
    }
  }
};

// Rows of one batch entry, read by fours of columns; in one load each where they lie so.
template <typename T>
struct Rows {
  const T* data;
  std::int64_t count;
  int width;
  bool aligned;

  // Columns c .. c + 3 of row r, zeros outside; c is a multiple of 4.
  FLATKERN_HD Four<T> get(std::int64_t r, int c) const {
    Four<T> out = {{T(0), T(0), T(0), T(0)}};
    if (r >= count || c >= width) return out;
    const T* from = data + r * width + c;
    if (aligned) return *reinterpret_cast<const Four<T>*>(from);
    FLATKERN_UNROLL
    for (int u = 0; u < 4; ++u) {
      if (c + u < width) out.v[u] = from[u];
    }
    return out;
  }
};

template <typename T>
FLATKERN_HD Rows<T> rows_of(const T* data, std::int64_t b, std::int64_t count, int width) {
  const bool aligned = width % 4 == 0 && reinterpret_cast<std::uintptr_t>(data) % sizeof(Four<T>) == 0;
  return {data ? data + b * count * width : nullptr, count, width, aligned};
}

template <typename T>
FLATKERN_HD void clear(T (&part)[kPart][kPart]) {
  FLATKERN_UNROLL
  for (int a = 0; a < kPart; ++a) {
    FLATKERN_UNROLL
    for (int c = 0; c < kPart; ++c) part[a][c] = T(0);
  }
}

template <typename T>
FLATKERN_HD void clear(Four<T> (&out)[kPart][kOwnFours]) {
  FLATKERN_UNROLL
  for (int a = 0; a < kPart; ++a) {
    FLATKERN_UNROLL
    for (int c = 0; c < kOwnFours; ++c) out[a][c] = {{T(0), T(0), T(0), T(0)}};
  }
}

// f(row, column, a, c) for the entries of a tile that are the thread's.
template <typename F>
FLATKERN_HD void own_entries(int thread, const F& f) {
  const int x = thread % kSide, y = thread / kSide;
  FLATKERN_UNROLL
  for (int a = 0; a < kPart; ++a) {
    FLATKERN_UNROLL
    for (int c = 0; c < kPart; ++c) f(y + kSide * a, x + kSide * c, a, c);
  }
}

// product[which] += the rows of `left` from `i` on times those of `right` from `j` on; nothing where one is
// null.
template <int which, typename Team, typename T>
FLATKERN_HD void add_product(Team& team, Room<T>& room, const Rows<T>& left, std::int64_t i,
                             const Rows<T>& right, std::int64_t j) {
  if (!left.data || !right.data) return;
  for (int start = 0; start < left.width; start += kTile) {
    team.phase([&](int thread, Registers<T>&) {
      FLATKERN_UNROLL
      for (int e = thread; e < kTile * kTile / 4; e += kThreads) {
        const int r = e / (kTile / 4), f = e % (kTile / 4);
        room.tile[0].row[r][f] = left.get(i + r, start + 4 * f);
        room.tile[1].row[r][f] = right.get(j + r, start + 4 * f);
      }
    });
    const int left_over = (left.width - start + 3) / 4, fours = left_over < kTile / 4 ? left_over : kTile / 4;
    team.phase([&](int thread, Registers<T>& own) {
      const int x = thread % kSide, y = thread / kSide;
      FLATKERN_UNROLL_BY(1)
      for (int f = 0; f < fours; ++f) {
        Four<T> p[kPart], q[kPart];
        FLATKERN_UNROLL
        for (int a = 0; a < kPart; ++a) {
          p[a] = room.tile[0].row[y + kSide * a][f];
          q[a] = room.tile[1].row[x + kSide * a][f];
        }
        FLATKERN_UNROLL
        for (int a = 0; a < kPart; ++a) {
          FLATKERN_UNROLL
          for (int c = 0; c < kPart; ++c) {
            FLATKERN_UNROLL
            for (int u = 0; u < 4; ++u) own.product[which][a][c] += p[a].v[u] * q[c].v[u];
          }
        }
      }
    });
  }
}

// out[which] += room.tile[from] times the rows of `right` from `j` on.
template <int which, typename Team, typename T>
FLATKERN_HD void add_image(Team& team, Room<T>& room, int from, const Rows<T>& right, std::int64_t j) {
  if (!right.data) return;
  for (int start = 0; start < kTile; start += kStrip) {
    team.phase([&](int thread, Registers<T>&) {
      FLATKERN_UNROLL
      for (int e = thread; e < kStrip * kFours; e += kThreads) {
        room.strip[e / kFours][e % kFours] = right.get(j + start + e / kFours, 4 * (e % kFours));
      }
    });
    team.phase([&](int thread, Registers<T>& own) {
      const int x = thread % kSide, y = thread / kSide;
      FLATKERN_UNROLL_BY(1)
      for (int f = 0; f < kStrip / 4; ++f) {
        Four<T> w[kPart];
        FLATKERN_UNROLL
        for (int a = 0; a < kPart; ++a) w[a] = room.tile[from].row[y + kSide * a][start / 4 + f];
        FLATKERN_UNROLL
        for (int u = 0; u < 4; ++u) {
          FLATKERN_UNROLL
          for (int c = 0; c < kOwnFours; ++c) {
            if (4 * kSide * c >= right.width) continue;  // the same for all threads
            const Four<T> b = room.strip[4 * f + u][x + kSide * c];
            FLATKERN_UNROLL
            for (int a = 0; a < kPart; ++a) {
              FLATKERN_UNROLL
              for (int z = 0; z < 4; ++z) own.out[which][a][c].v[z] += w[a].v[u] * b.v[z];
            }
          }
        }
      }
    });
  }
}

// f(row, column, value) for the thread's part of a result, within `width` columns.
template <typename T, typename F>
FLATKERN_HD void own_results(int thread, const Four<T> (&out)[kPart][kOwnFours], std::int64_t rows, int width,
                             const F& f) {
  const int x = thread % kSide, y = thread / kSide;
  FLATKERN_UNROLL
  for (int a = 0; a < kPart; ++a) {
    FLATKERN_UNROLL
    for (int c = 0; c < kOwnFours; ++c) {
      FLATKERN_UNROLL
      for (int z = 0; z < 4; ++z) {
        const int r = y + kSide * a, column = 4 * (x + kSide * c) + z;
        if (r < rows && column < width) f(r, column, out[a][c].v[z]);
      }
    }
  }
}

}  // namespace flatkern::attention
