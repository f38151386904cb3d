// Gradients of shared weights, unformed: gamma = sum_t g_t a_t^T. Both operands are read where they lie.
#pragma once

#include <cstdint>

#include "matrices.h"

namespace flatkern {

// One operand [samples, positions, features]. Positions and features may each be several dimensions of
// memory: the overlapping patches of a convolution are such a view of its padded input.
template <typename T>
struct GhostOperand {
  const T* data = nullptr;
  Batch samples, positions, features;
};

// a [n, T, d_in] and g [K, n, T, d_out].
template <typename T>
struct GhostInput {
  GhostOperand<T> a, g;
  std::int64_t cotangents = 0, cotangent_stride = 0;
  std::int64_t positions = 0, d_in = 0, d_out = 0;
};

}  // namespace flatkern
