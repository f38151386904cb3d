// The passes as units of work that depend on nothing but their number: what a launch consists of, and the
// same units one after the other on the host.
#pragma once

#include <memory>
#include <type_traits>

#include "attention_passes.h"

namespace flatkern::attention {

template <typename T>
struct Forward {
  Attention<T> a;
  T *out, *stats;

  FLATKERN_HD std::int64_t units() const { return a.batch * tiles_of(a.queries); }
  template <typename Team>
  FLATKERN_HD void operator()(Team& team, Room<T>& room, std::int64_t unit) const {
    const std::int64_t tiles = tiles_of(a.queries);
    forward_pass(team, room, a, unit / tiles, unit % tiles * kTile, out, stats);
  }
};

template <typename T>
struct Tangent {
  Attention<T> a;
  const T* out;
  T *image, *mean;

  FLATKERN_HD std::int64_t units() const { return a.batch * tiles_of(a.queries); }
  template <typename Team>
  FLATKERN_HD void operator()(Team& team, Room<T>& room, std::int64_t unit) const {
    const std::int64_t tiles = tiles_of(a.queries);
    tangent_pass(team, room, a, unit / tiles, unit % tiles * kTile, out, image, mean);
  }
};

// The gradient, or with `twice` what it changes by along tangents: in the queries, ...
template <typename T, bool twice>
struct QuerySums {
  Attention<T> a;
  T* q;

  FLATKERN_HD std::int64_t units() const { return q ? a.batch * tiles_of(a.queries) : 0; }
  template <typename Team>
  FLATKERN_HD void operator()(Team& team, Room<T>& room, std::int64_t unit) const {
    const std::int64_t tiles = tiles_of(a.queries);
    query_pass<twice>(team, room, a, unit / tiles, unit % tiles * kTile, q);
  }
};

// ... in keys and values (null: not wanted), ...
template <typename T, bool twice>
struct KeySums {
  Attention<T> a;
  T *k, *v;

  FLATKERN_HD std::int64_t units() const { return k || v ? a.batch * tiles_of(a.keys) : 0; }
  template <typename Team>
  FLATKERN_HD void operator()(Team& team, Room<T>& room, std::int64_t unit) const {
    const std::int64_t tiles = tiles_of(a.keys);
    key_pass<twice>(team, room, a, unit / tiles, unit % tiles * kTile, k, v);
  }
};

// ... and in the mask.
template <typename T, bool twice>
struct MaskSums {
  Attention<T> a;
  T* mask;

  FLATKERN_HD std::int64_t units() const {
    return mask ? a.masks * tiles_of(a.mask_rows) * tiles_of(a.mask_cols) : 0;
  }
  template <typename Team>
  FLATKERN_HD void operator()(Team& team, Room<T>& room, std::int64_t unit) const {
    mask_pass<twice>(team, room, a, unit, mask);
  }
};

template <typename Pass>
void on_host(const Pass& pass, bool backwards = false) {
  typedef std::remove_const_t<std::remove_pointer_t<decltype(pass.a.q)>> T;
  HostTeam<T> team;
  team.backwards = backwards;
  const auto room = std::make_unique<Room<T>>();
  for (std::int64_t unit = 0; unit < pass.units(); ++unit) pass(team, *room, unit);
}

}  // namespace flatkern::attention
