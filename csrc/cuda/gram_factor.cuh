// What the statistics' kernels leave to do, by a block a sample: the inverse of the Gram matrix, and the
// statistics of samples whose Gram matrix has lost its digits in double. Each block looks at its own sample,
// so nothing waits for the host.
#pragma once

#include "../common/double_double.h"
#include "launch.cuh"
#include "ldl.cuh"

namespace flatkern::cuda {

constexpr int kFactorThreads = 128;

// (L D L^T)^-1 from the packed factor a (u_ij = l_ij d_j below the diagonal) and the reciprocal pivots, a
// column a thread: h = L^-T D^-1 L^-1 e_j, where `out` itself is the working space: entry (k, j) at out[k c +
// j].
template <typename T>
__device__ __forceinline__ void invert_columns(const T* a, const T* reciprocals, int c, bool good, T* out) {
  for (int j = threadIdx.x; j < c; j += blockDim.x) {
    for (int k = 0; k < c; ++k) {
      T h = k == j && good ? T(1) : T(0);
      if (good && k > j) {
        for (int t = j; t < k; ++t) h -= a[packed(k, t)] * (reciprocals[t] * out[t * c + j]);
      }
      out[k * c + j] = h;
    }
    if (!good) continue;
    for (int k = c - 1; k >= 0; --k) {
      T h = out[k * c + j];
      for (int t = k + 1; t < c; ++t) h -= a[packed(t, k)] * out[t * c + j];
      out[k * c + j] = h * reciprocals[k];
    }
  }
}

// The lower triangle of the Gram matrix of a sample in double-double, by a block.
template <typename T>
__device__ __forceinline__ void wide_gram(const Matrices<T>& x, const T* from, double* high, double* low,
                                          double* diagonal) {
  const int c = static_cast<int>(x.rows);
  for (int e = threadIdx.x; e < c * c; e += blockDim.x) {
    const int row = e / c, col = e - row * c;
    if (col > row) continue;
    DoubleDouble sum = {0, 0};
    for (std::int64_t k = 0; k < x.cols; ++k) {
      sum = add_product(sum, static_cast<double>(from[row * x.row_stride + k * x.col_stride]),
                        static_cast<double>(from[col * x.row_stride + k * x.col_stride]));
    }
    high[packed(row, col)] = sum.hi;
    low[packed(row, col)] = sum.lo;
    if (row == col) diagonal[row] = sum.hi;
  }
}

// Its L D L^T in place (u_ij = l_ij d_j below the diagonal), by a block; a pivot that is no good is left out,
// with its column. Returns the sum of the logarithms of the others.
__device__ __forceinline__ double wide_ldl(double* high, double* low, const double* diagonal, int c,
                                           double tolerance, PivotReport& report) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  double log_sum = 0;
  for (int k = 0; k < c; ++k) {
    const DoubleDouble d = {high[packed(k, k)], low[packed(k, k)]};
    const bool ok = good_pivot(d.hi, diagonal[k], tolerance);
    const DoubleDouble inverse = ok ? reciprocal(d) : DoubleDouble{0, 0};
    report.take(d.hi, diagonal[k], ok);
    if (ok) log_sum += log(d.hi);
    for (int row = k + 1 + ty; row < c; row += static_cast<int>(blockDim.x) / 16) {
      const int at = row * (row + 1) / 2;
      const DoubleDouble scaled = multiply({high[at + k], low[at + k]}, inverse);
      for (int col = k + 1 + tx; col <= row; col += 16) {
        const int across = col * (col + 1) / 2 + k;
        const DoubleDouble product = multiply(scaled, {high[across], low[across]});
        const DoubleDouble after = add({high[at + col], low[at + col]}, negate(product));
        high[at + col] = after.hi;
        low[at + col] = after.lo;
      }
    }
    __syncthreads();
  }
  return log_sum;
}

// Samples that are finite and not lost: the inverse from the Gram matrix. Lost ones: everything anew in twice
// the precision, from the rows.
template <typename T>
__global__ void __launch_bounds__(kFactorThreads)
    factor_block(Matrices<T> x, std::int64_t n, GramStatsOut out, double lost_below, double tolerance) {
  FLATKERN_DYNAMIC_SHARED(double, shared);
  const int c = static_cast<int>(x.rows), entries = static_cast<int>(packed(c, 0));
  double* high = shared;
  double* low = high + entries;
  double* diagonal = low + entries;
  for (std::int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const double ratio = out.pivot_ratio[i];
    const bool finite = ratio == ratio;
    const bool wide = finite && x.rows <= x.cols && (ratio < lost_below || out.rank_deficient[i]);
    bool good = finite && !wide && !out.rank_deficient[i];
    __syncthreads();  // everybody has read what is written below
    if (wide) {
      wide_gram(x, x.sample(i), high, low, diagonal);
      __syncthreads();
      PivotReport report;
      const double log_sum = wide_ldl(high, low, diagonal, c, tolerance, report);
      good = report.bad == 0;
      if (threadIdx.x == 0) {
        const double infinity = static_cast<double>(__int_as_float(0x7f800000));
        out.logdet[i] = good ? log_sum : -infinity;
        out.rank_deficient[i] = !good;
        out.pivot_ratio[i] = report.ratio;
        out.bad_pivots[i] = report.bad;
      }
    } else if (out.inverse && good) {
      const double* g = out.gram + i * c * c;
      for (int e = threadIdx.x; e < c * c; e += blockDim.x) {
        const int row = e / c, col = e - row * c;
        if (col <= row) high[packed(row, col)] = g[row * c + col];
      }
      __syncthreads();
      ldl_block(high, low, c, 0.0, true);  // `low` is c + 32 values of room, and more
    }
    __syncthreads();
    if (out.inverse) {
      for (int k = threadIdx.x; k < c; k += blockDim.x) diagonal[k] = good ? 1 / high[packed(k, k)] : 0.0;
      __syncthreads();
      invert_columns(high, diagonal, c, good, out.inverse + i * c * c);
    }
    __syncthreads();
  }
}

template <typename T>
int factor_again(const Matrices<T>& x, const GramStatsOut& out, void* stream) {
  const std::int64_t n = x.batch.count(), c = x.rows;
  if (n == 0 || c == 0) return 0;
  const std::size_t bytes = static_cast<std::size_t>(2 * packed(c, 0) + 2 * c + 32) * sizeof(double);
  const double tolerance = gram_tolerance<T>(c, x.cols), least = lost_digits<T>();
  return launch_kernel(factor_block<T>, blocks_for(n), kFactorThreads, bytes, stream, x, n, out,
                       tolerance > least ? tolerance : least, lq_tolerance<T>(c));
}

}  // namespace flatkern::cuda
