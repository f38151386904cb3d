// A batch of matrices with arbitrary strides, as both doors hand it to the kernels.
#pragma once

#include <cstdint>

#include "hd.h"

namespace flatkern {

constexpr int kMaxBatchDims = 8;

// The batch dimensions, outermost first. Strides count elements; 0 (expanded) and negative ones are fine.
struct Batch {
  int dims = 0;
  std::int64_t size[kMaxBatchDims] = {};
  std::int64_t stride[kMaxBatchDims] = {};

  FLATKERN_HD std::int64_t count() const {
    std::int64_t n = 1;
    for (int k = 0; k < dims; ++k) n *= size[k];
    return n;
  }

  // Offset of sample i in elements: i written in the mixed radix of the sizes, dotted with the strides.
  FLATKERN_HD std::int64_t offset(std::int64_t i) const {
    if (dims == 1) return i * stride[0];
    std::int64_t sum = 0;
    for (int k = dims - 1; k >= 0; --k) {
      const std::int64_t q = i / size[k];
      sum += (i - q * size[k]) * stride[k];
      i = q;
    }
    return sum;
  }

  // Appends an inner dimension, merged with the one before where both are one run in memory.
  // False: more dimensions than fit, the caller has to copy.
  bool push(std::int64_t n, std::int64_t s) {
    if (n == 1) return true;
    if (dims > 0 && stride[dims - 1] == n * s) {
      size[dims - 1] *= n;
      stride[dims - 1] = s;
      return true;
    }
    if (dims == kMaxBatchDims) return false;
    size[dims] = n;
    stride[dims] = s;
    ++dims;
    return true;
  }
};

template <typename T>
struct Matrices {
  const T* data = nullptr;
  Batch batch;
  std::int64_t rows = 0, cols = 0;
  std::int64_t row_stride = 0, col_stride = 0;

  FLATKERN_HD const T* sample(std::int64_t i) const { return data + batch.offset(i); }
};

// Where the statistics of a batch of Gram matrices go: one entry a sample, contiguous. `gram` and `inverse`
// receive a c x c matrix a sample for the derivatives; both are null where none are wanted.
struct GramStatsOut {
  double* logdet;
  double* trace;
  double* frobenius_sq;
  bool* rank_deficient;
  double* pivot_ratio;
  std::int64_t* bad_pivots;
  double* gram;
  double* inverse;
};

// The cotangents of a Gram matrix's statistics, one entry a sample; and the matrix and its inverse.
struct GramCotangents {
  const double* logdet;
  const double* trace;
  const double* frobenius_sq;
  const double* gram;
  const double* inverse;
};

}  // namespace flatkern
