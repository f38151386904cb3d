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

// `rows` rows of `cols`; tangents rows * cols further on. Curvatures: one number a tangent and row.
template <typename E>
struct SoftmaxCurvatureArgs {
  std::int64_t rows, cols, k;
  const E *p, *t, *g;
  bool log;
  wide_t<E>* curvature;
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

// unit: what was normalized; inverse: 1 / sigma of every row. weight may be null.
template <typename E>
struct NormTangentArgs {
  std::int64_t rows, cols, k;
  const E* unit;
  const wide_t<E>* inverse;
  const E *t, *weight;
  E* tangent;
};

template <typename E>
struct NormCurvatureArgs {
  std::int64_t rows, cols, k;
  const E* unit;
  const wide_t<E>* inverse;
  const E *t, *g, *weight;
  wide_t<E>* curvature;
};

}  // namespace flatkern
