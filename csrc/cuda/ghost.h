// The ghost norm on the GPU as the torch door sees it; see kernels.h.
#pragma once

#include "../common/ghost.h"
#include "kernels.h"

namespace flatkern::cuda {

// Partial sums of one cotangent and sample: at most kMaxGhostBlocks, whatever the sizes.
constexpr std::int64_t kMaxGhostBlocks = 64;
constexpr int kGhostSide = 64;

template <typename T>
std::int64_t ghost_blocks(const GhostInput<T>& x, bool formed) {
  const auto tiles = [](std::int64_t size) { return (size + kGhostSide - 1) / kGhostSide; };
  const std::int64_t along = tiles(x.positions);
  const std::int64_t all = formed ? tiles(x.d_in) * tiles(x.d_out) : along * (along + 1) / 2;
  return all < 1 ? 1 : (all < kMaxGhostBlocks ? all : kMaxGhostBlocks);
}

// out [K, n]; `partial` is room for K n ghost_blocks(x) numbers.
template <typename T>
int ghost_norm(const GhostInput<T>& x, bool formed, std::int64_t blocks, double* partial, double* out,
               void* stream);

}  // namespace flatkern::cuda
