// Attention and its derivatives as passes of one team over tiles of the scores, which are never stored: by
// queries (64 of them, all their keys) for what has a row a query, by keys (64 of them, all queries that see
// them) for what has a row a key, and by tiles of the mask. Formulas: flatkern/kernels/_attention_blocks.py.
#pragma once

#include "attention_tiles.h"

namespace flatkern::attention {

FLATKERN_HD std::int64_t tiles_of(std::int64_t length) {
  return (length + kTile - 1) / kTile;
}

// How many keys the queries from `first` to first + 63 see.
template <typename T>
FLATKERN_HD std::int64_t keys_seen(const Attention<T>& a, std::int64_t first) {
  return a.causal && first + kTile < a.keys ? first + kTile : a.keys;
}

// The first tile of queries that sees the keys from `first` on.
template <typename T>
FLATKERN_HD std::int64_t first_query(const Attention<T>& a, std::int64_t first) {
  return a.causal ? first : 0;
}

template <typename T>
FLATKERN_HD T sum_of(const T (&part)[4]) {
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// O and the row statistics of 64 queries: the sums are rescaled where a later tile has a larger score.
template <typename Team, typename T>
FLATKERN_HD void forward_pass(Team& team, Room<T>& room, const Attention<T>& a, std::int64_t b,
                              std::int64_t i, T* out, T* stats) {
  const Rows<T> q = rows_of(a.q, b, a.queries, a.width), k = rows_of(a.k, b, a.keys, a.width);
  const Rows<T> v = rows_of(a.v, b, a.keys, a.value_width);
  const AttentionPlace at = a.place(b);
  const T infinity = static_cast<T>(INFINITY);
  team.phase([&](int thread, Registers<T>& own) {
    clear(own.out[0]);
    if (thread < kTile) room.top[thread] = -infinity, room.sum[thread] = T(0);
  });
  const std::int64_t seen = keys_seen(a, i);
  for (std::int64_t j = 0; j < seen; j += kTile) {
    team.phase([&](int, Registers<T>& own) { clear(own.product[0]); });
    add_product<0>(team, room, q, i, k, j);
    team.phase([&](int thread, Registers<T>& own) {
      own_entries(thread, [&](int r, int c, int m, int n) {
        room.tile[0].at(r, c) = attention_score(a, at, i + r, j + c, own.product[0][m][n]);
      });
    });
    // four threads a row
    team.phase([&](int thread, Registers<T>&) {
      const int r = thread / 4;
      T most = -infinity;
      for (int c = thread % 4; c < kTile / 4; c += 4) {
        const Four<T> s = room.tile[0].row[r][c];
        for (int u = 0; u < 4; ++u) most = s.v[u] > most ? s.v[u] : most;
      }
      room.part[r][thread % 4] = most;
    });
    team.phase([&](int thread, Registers<T>&) {
      const int r = thread / 4;
      T top = room.top[r], sum = T(0);
      for (int u = 0; u < 4; ++u) top = room.part[r][u] > top ? room.part[r][u] : top;
      top = top == -infinity ? T(0) : top;
      for (int c = thread % 4; c < kTile / 4; c += 4) {
        Four<T>& s = room.tile[0].row[r][c];
        for (int u = 0; u < 4; ++u) {
          s.v[u] = a.exponential(s.v[u] - top);
          sum += s.v[u];
        }
      }
      room.part_sum[r][thread % 4] = sum;
    });
    team.phase([&](int thread, Registers<T>&) {
      if (thread >= kTile) return;
      const T before = room.top[thread];
      T top = before;
      for (int u = 0; u < 4; ++u) top = room.part[thread][u] > top ? room.part[thread][u] : top;
      room.top[thread] = top;
      room.factor[thread] = before == top ? T(1) : a.exponential(before - top);
      room.sum[thread] = room.sum[thread] * room.factor[thread] + sum_of(room.part_sum[thread]);
    });
    team.phase([&](int thread, Registers<T>& own) {
      FLATKERN_UNROLL
      for (int m = 0; m < kPart; ++m) {
        const T factor = room.factor[thread / kSide + kSide * m];
        FLATKERN_UNROLL
        for (int c = 0; c < kOwnFours; ++c) {
          FLATKERN_UNROLL
          for (int z = 0; z < 4; ++z) own.out[0][m][c].v[z] *= factor;
        }
      }
    });
    add_image<0>(team, room, 0, v, j);
  }
  team.phase([&](int thread, Registers<T>&) {
    if (thread >= kTile) return;
    const T inverse = room.sum[thread] == T(0) ? T(0) : T(1) / room.sum[thread];
    room.factor[thread] = inverse;
    if (i + thread < a.queries) {
      T* to = stats + 2 * (b * a.queries + i + thread);
      to[0] = room.top[thread] == -infinity ? T(0) : room.top[thread];
      to[1] = inverse;
    }
  });
  team.phase([&](int thread, Registers<T>& own) {
    T* to = out + (b * a.queries + i) * a.value_width;
    own_results(thread, own.out[0], a.queries - i, a.value_width,
                [&](int r, int c, T x) { to[r * a.value_width + c] = x * room.factor[r]; });
  });
}

// O. of 64 queries, and `mean` for the passes below; `out` is O.
template <typename Team, typename T>
FLATKERN_HD void tangent_pass(Team& team, Room<T>& room, const Attention<T>& a, std::int64_t b,
                              std::int64_t i, const T* out, T* image, T* mean) {
  const Rows<T> q = rows_of(a.q, b, a.queries, a.width), k = rows_of(a.k, b, a.keys, a.width);
  const Rows<T> dq = rows_of(a.dq, b, a.queries, a.width), dk = rows_of(a.dk, b, a.keys, a.width);
  const Rows<T> v = rows_of(a.v, b, a.keys, a.value_width), dv = rows_of(a.dv, b, a.keys, a.value_width);
  const AttentionPlace at = a.place(b);
  team.phase([&](int, Registers<T>& own) {
    clear(own.out[0]);
    FLATKERN_UNROLL
    for (int m = 0; m < kPart; ++m) own.row[m] = T(0);
  });
  const std::int64_t seen = keys_seen(a, i);
  for (std::int64_t j = 0; j < seen; j += kTile) {
    team.phase([&](int, Registers<T>& own) { clear(own.product[0]), clear(own.product[1]); });
    add_product<0>(team, room, q, i, k, j);
    add_product<1>(team, room, dq, i, k, j);
    add_product<1>(team, room, q, i, dk, j);
    team.phase([&](int thread, Registers<T>& own) {
      own_entries(thread, [&](int r, int c, int m, int n) {
        T p, changed;
        attention_tangent_entry(a, at, i + r, j + c, own.product[0][m][n], own.product[1][m][n], &p,
                                &changed);
        own.row[m] += changed;
        room.tile[0].at(r, c) = changed;
        room.tile[1].at(r, c) = p;
      });
    });
    add_image<0>(team, room, 0, v, j);
    add_image<0>(team, room, 1, dv, j);
  }
  team.phase([&](int thread, Registers<T>& own) {
    FLATKERN_UNROLL
    for (int m = 0; m < kPart; ++m) room.tile[0].at(thread / kSide + kSide * m, thread % kSide) = own.row[m];
  });
  team.phase([&](int thread, Registers<T>&) {
    if (thread >= kTile) return;
    T sum = T(0);
    for (int c = 0; c < kSide; ++c) sum += room.tile[0].at(thread, c);
    room.sum[thread] = sum;
    if (i + thread < a.queries) mean[b * a.queries + i + thread] = sum;
  });
  team.phase([&](int thread, Registers<T>& own) {
    const std::int64_t start = (b * a.queries + i) * a.value_width;
    own_results(thread, own.out[0], a.queries - i, a.value_width, [&](int r, int c, T x) {
      const std::int64_t e = start + r * a.value_width + c;
      image[e] = x - room.sum[r] * out[e];
    });
  });
}

// The products of attention_entry for 64 queries and 64 keys, by rows of queries or of keys; only those that
// the results need.
template <bool twice, bool by_keys, typename Team, typename T>
FLATKERN_HD void entry_products(Team& team, Room<T>& room, const Attention<T>& a, std::int64_t b,
                                std::int64_t i, std::int64_t j, bool scores_only) {
  const Rows<T> q = rows_of(a.q, b, a.queries, a.width), k = rows_of(a.k, b, a.keys, a.width);
  const Rows<T> dq = rows_of(a.dq, b, a.queries, a.width), dk = rows_of(a.dk, b, a.keys, a.width);
  const Rows<T> g = rows_of(a.g, b, a.queries, a.value_width), v = rows_of(a.v, b, a.keys, a.value_width);
  const Rows<T> dg = rows_of(a.dg, b, a.queries, a.value_width), dv = rows_of(a.dv, b, a.keys, a.value_width);
  team.phase([&](int, Registers<T>& own) {
    FLATKERN_UNROLL
    for (int which = 0; which < 4; ++which) clear(own.product[which]);
  });
  const std::int64_t rows = by_keys ? j : i, cols = by_keys ? i : j;
  add_product<0>(team, room, by_keys ? k : q, rows, by_keys ? q : k, cols);
  if (twice) {
    add_product<1>(team, room, by_keys ? k : dq, rows, by_keys ? dq : k, cols);
    add_product<1>(team, room, by_keys ? dk : q, rows, by_keys ? q : dk, cols);
  }
  if (scores_only) return;
  add_product<2>(team, room, by_keys ? v : g, rows, by_keys ? g : v, cols);
  if (twice) {
    add_product<3>(team, room, by_keys ? dv : g, rows, by_keys ? g : dv, cols);
    add_product<3>(team, room, by_keys ? v : dg, rows, by_keys ? dg : v, cols);
  }
}

// The entry (m, n) of a thread's products.
template <bool twice, typename T>
FLATKERN_HD AttentionEntry<T> entry_of(const Attention<T>& a, const AttentionPlace& at, std::int64_t i,
                                       std::int64_t j, const Registers<T>& own, int m, int n) {
  const T products[4] = {own.product[0][m][n], own.product[1][m][n], own.product[2][m][n],
                         own.product[3][m][n]};
  return attention_entry<twice>(a, at, i, j, products);
}

// dq of 64 queries, or with `twice` what it changes by along the tangents.
template <bool twice, typename Team, typename T>
FLATKERN_HD void query_pass(Team& team, Room<T>& room, const Attention<T>& a, std::int64_t b, std::int64_t i,
                            T* to) {
  const Rows<T> k = rows_of(a.k, b, a.keys, a.width), dk = rows_of(a.dk, b, a.keys, a.width);
  const AttentionPlace at = a.place(b);
  team.phase([&](int, Registers<T>& own) { clear(own.out[0]); });
  const std::int64_t seen = keys_seen(a, i);
  for (std::int64_t j = 0; j < seen; j += kTile) {
    entry_products<twice, false>(team, room, a, b, i, j, false);
    team.phase([&](int thread, Registers<T>& own) {
      own_entries(thread, [&](int r, int c, int m, int n) {
        const AttentionEntry<T> x = entry_of<twice>(a, at, i + r, j + c, own, m, n);
        room.tile[0].at(r, c) = twice ? x.ds_dot : x.ds;
        if (twice) room.tile[1].at(r, c) = x.ds;
      });
    });
    add_image<0>(team, room, 0, k, j);
    if (twice) add_image<0>(team, room, 1, dk, j);
  }
  team.phase([&](int thread, Registers<T>& own) {
    T* rows = to + (b * a.queries + i) * a.width;
    own_results(thread, own.out[0], a.queries - i, a.width,
                [&](int r, int c, T x) { rows[r * a.width + c] = a.scale * x; });
  });
}

// dk and dv of 64 keys, or with `twice` what they change by; null where not wanted.
template <bool twice, typename Team, typename T>
FLATKERN_HD void key_pass(Team& team, Room<T>& room, const Attention<T>& a, std::int64_t b, std::int64_t j,
                          T* to_k, T* to_v) {
  const Rows<T> q = rows_of(a.q, b, a.queries, a.width), dq = rows_of(a.dq, b, a.queries, a.width);
  const Rows<T> g = rows_of(a.g, b, a.queries, a.value_width),
                dg = rows_of(a.dg, b, a.queries, a.value_width);
  const AttentionPlace at = a.place(b);
  team.phase([&](int, Registers<T>& own) { clear(own.out[0]), clear(own.out[1]); });
  for (std::int64_t i = first_query(a, j); i < a.queries; i += kTile) {
    entry_products<twice, true>(team, room, a, b, i, j, !to_k);
    team.phase([&](int thread, Registers<T>& own) {
      own_entries(thread, [&](int r, int c, int m, int n) {
        const AttentionEntry<T> x = entry_of<twice>(a, at, i + c, j + r, own, m, n);
        room.tile[0].at(r, c) = twice ? x.ds_dot : x.ds;
        if (twice) room.tile[1].at(r, c) = x.ds;
        own.product[0][m][n] = x.p;  // for the second half
        if (twice) own.product[1][m][n] = x.p_dot;
      });
    });
    if (to_k) {
      add_image<0>(team, room, 0, q, i);
      if (twice) add_image<0>(team, room, 1, dq, i);
    }
    if (!to_v) continue;
    team.phase([&](int thread, Registers<T>& own) {
      own_entries(thread, [&](int r, int c, int m, int n) {
        room.tile[0].at(r, c) = twice ? own.product[1][m][n] : own.product[0][m][n];
        if (twice) room.tile[1].at(r, c) = own.product[0][m][n];
      });
    });
    add_image<1>(team, room, 0, g, i);
    if (twice) add_image<1>(team, room, 1, dg, i);
  }
  team.phase([&](int thread, Registers<T>& own) {
    if (to_k) {
      T* rows = to_k + (b * a.keys + j) * a.width;
      own_results(thread, own.out[0], a.keys - j, a.width,
                  [&](int r, int c, T x) { rows[r * a.width + c] = a.scale * x; });
    }
    if (to_v) {
      T* rows = to_v + (b * a.keys + j) * a.value_width;
      own_results(thread, own.out[1], a.keys - j, a.value_width,
                  [&](int r, int c, T x) { rows[r * a.value_width + c] = x; });
    }
  });
}

// One tile of the mask's gradient [masks, mask_rows, mask_cols], or of what it changes by: sums over the
// batch entries that have this mask, and over queries and keys where the mask has one row or column for all.
template <bool twice, typename Team, typename T>
FLATKERN_HD void mask_pass(Team& team, Room<T>& room, const Attention<T>& a, std::int64_t unit, T* to) {
  const std::int64_t across = tiles_of(a.mask_cols), down = tiles_of(a.mask_rows);
  const std::int64_t mask = unit / (across * down);
  const std::int64_t i0 = unit / across % down * kTile, j0 = unit % across * kTile;
  const std::int64_t i_end = a.mask_rows > 1 ? i0 + 1 : a.queries, j_end = a.mask_cols > 1 ? j0 + 1 : a.keys;
  team.phase([&](int, Registers<T>& own) { clear(own.sum); });
  for (std::int64_t b = 0; b < a.batch; ++b) {
    if (a.places.offset(b) != mask) continue;
    const AttentionPlace at = a.place(b);
    for (std::int64_t i = i0; i < i_end; i += kTile) {
      for (std::int64_t j = j0; j < j_end && j < keys_seen(a, i); j += kTile) {
        entry_products<twice, false>(team, room, a, b, i, j, false);
        team.phase([&](int thread, Registers<T>& own) {
          own_entries(thread, [&](int r, int c, int m, int n) {
            const AttentionEntry<T> x = entry_of<twice>(a, at, i + r, j + c, own, m, n);
            own.sum[m][n] += twice ? x.ds_dot : x.ds;
          });
        });
      }
    }
  }
  team.phase([&](int thread, Registers<T>& own) {
    own_entries(thread, [&](int r, int c, int m, int n) { room.tile[0].at(r, c) = own.sum[m][n]; });
  });
  if (a.mask_cols == 1) {
    team.phase([&](int thread, Registers<T>&) {
      if (thread >= kTile) return;
      T sum = T(0);
      for (int c = 0; c < kTile; ++c) sum += room.tile[0].at(thread, c);
      room.tile[0].at(thread, 0) = sum;
    });
  }
  if (a.mask_rows == 1) {
    team.phase([&](int thread, Registers<T>&) {
      if (thread >= kTile) return;
      T sum = T(0);
      for (int r = 0; r < kTile; ++r) sum += room.tile[0].at(r, thread);
      room.tile[0].at(0, thread) = sum;
    });
  }
  team.phase([&](int thread, Registers<T>&) {
    for (int e = thread; e < kTile * kTile; e += kThreads) {
      const int r = e / kTile, c = e % kTile;
      if (i0 + r < a.mask_rows && j0 + c < a.mask_cols) {
        to[(mask * a.mask_rows + i0 + r) * a.mask_cols + j0 + c] = room.tile[0].at(r, c);
      }
    }
  });
}

}  // namespace flatkern::attention
