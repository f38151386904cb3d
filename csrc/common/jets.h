// What the jets take and give, as both doors hand it to the kernels: contiguous rows; E is the storage type,
// which is computed in wide_t<E>.
#pragma once

#include <cstdint>

#include "activation_math.h"
#include "bf16.h"

namespace flatkern {

// n entries; k tangents, each n entries further on. Pointers that are not wanted are null.
template <typename E>
struct ActivationDerivativesArgs {
  const E* z;
  E *value, *slope, *bend;
};

template <typename E>
struct ActivationJetArgs {
  const E *z, *t, *s;
  std::int64_t k;
  E *value, *first, *second;
};

template <typename E>
struct ActivationPullbackArgs {
  const E *z, *g, *t, *dg;
  std::int64_t k;
  E *cotangent, *tangents;
};

// `rows` rows of `cols`; tangents rows * cols further on.
template <typename E>
struct SoftmaxJetArgs {
  std::int64_t rows, cols, k;
  const E *z, *t;
  bool log;
  E *value, *first, *second;
};

// scale: one a row, null for 1; excess (log of the sum of exp(z - max z)) and gradient may be null.
template <typename E>
struct LogSumExpArgs {
  std::int64_t rows, cols, k;
  const E* z;
  const wide_t<E>* scale;
  const E* v;
  wide_t<E>* excess;
  E *gradient, *product;
};

template <typename E>
struct NormJetArgs {
  std::int64_t rows, cols, k;
  const E *x, *t, *weight, *bias;
  double eps;
  bool centred;
  E *value, *first, *second;
};

template <typename E>
struct NormPullbackArgs {
  std::int64_t rows, cols, k;
  const E *x, *g, *t, *dg, *weight;
  double eps;
  bool centred;
  E *cotangent, *tangents;
};

}  // namespace flatkern
