// L D L^T of one matrix by a warp (rows in registers, one a lane) or by a block (packed triangle in shared
// memory), with the pivot rules of common/spd_math.h.
#pragma once

#include "../common/matrices.h"
#include "../common/spd_math.h"

namespace flatkern::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T sum_over_warp(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// What the pivots say besides the log-determinant: the least of them over its diagonal entry, how many were
// no good.
struct PivotReport {
  double ratio = 1;
  int bad = 0;

  template <typename T>
  __device__ __forceinline__ void take(T pivot, T diagonal, bool ok) {
    const double part = diagonal > T(0) ? static_cast<double>(pivot / diagonal) : 0.0;
    ratio = part < ratio ? part : ratio;
    bad += !ok;
  }
};

// log det, or what stands for it: NaN for input that is not finite, -inf below the numerical rank.
template <typename T>
__device__ __forceinline__ T conclude(T log_sum, bool good, bool finite) {
  const T infinity = static_cast<T>(__int_as_float(0x7f800000));
  return finite ? (good ? log_sum : -infinity) : infinity - infinity;
}

// Lane i of each group of C lanes holds row i of its own matrix in a[0 .. i]; lanes c and up hold zeros.
// Every lane of the warp takes part. Returns the log-determinant to all lanes of the group.
template <typename T, int C>
__device__ __forceinline__ T ldl_lanes(T (&a)[C], int c, T tolerance, bool finite,
                                       PivotReport* report = nullptr) {
  const int lane = threadIdx.x % C;
  T diagonal = T(0), pivot = T(1);
  bool good = true;
#pragma unroll
  for (int k = 0; k < C; ++k) {
    if (lane == k) diagonal = a[k];
  }
#pragma unroll
  for (int k = 0; k < C; ++k) {
    if (k < c) {  // the same for the whole warp
      const T d = __shfl_sync(kAllLanes, a[k], k, C);
      const T g = __shfl_sync(kAllLanes, diagonal, k, C);
      const bool ok = good_pivot(d, g, tolerance);
      const T inverse = ok ? T(1) / d : T(0);
      const T u = a[k];
      good = good && ok;
      if (lane == k && ok) pivot = d;
      if (report) report->take(d, g, ok);
#pragma unroll
      for (int j = k + 1; j < C; ++j) {
        const T l = __shfl_sync(kAllLanes, u, j, C) * inverse;
        if (lane >= j) a[j] -= u * l;
      }
    }
  }
  T log_sum = log(pivot);
#pragma unroll
  for (int step = C / 2; step > 0; step /= 2) log_sum += __shfl_xor_sync(kAllLanes, log_sum, step, C);
  return conclude(log_sum, good, finite);
}

// The same for one matrix by a whole block: `a` is the packed lower triangle in shared memory, `scratch` room
// for c + 32 values there. The result is valid in thread 0.
template <typename T>
__device__ __forceinline__ T ldl_block(T* a, T* scratch, int c, T tolerance, bool finite,
                                       PivotReport* report = nullptr) {
  T* diagonal = scratch;
  T* partial = scratch + c;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, rows = blockDim.x / 16;
  for (int i = threadIdx.x; i < c; i += blockDim.x) diagonal[i] = a[packed(i, i)];
  __syncthreads();
  for (int k = 0; k < c; ++k) {
    // column k is final: its own updates ended with the step before
    const T d = a[packed(k, k)];
    const bool ok = good_pivot(d, diagonal[k], tolerance);
    const T inverse = ok ? T(1) / d : T(0);
    if (report) report->take(d, diagonal[k], ok);
    for (int i = k + 1 + ty; i < c; i += rows) {
      const T scaled = a[packed(i, k)] * inverse;
      for (int j = k + 1 + tx; j <= i; j += 16) a[packed(i, j)] -= scaled * a[packed(j, k)];
    }
    __syncthreads();
  }
  T log_sum = T(0);
  bool good = true;
  for (int i = threadIdx.x; i < c; i += blockDim.x) {
    const bool ok = good_pivot(a[packed(i, i)], diagonal[i], tolerance);
    good = good && ok;
    log_sum += ok ? log(a[packed(i, i)]) : T(0);
  }
  good = __syncthreads_and(good);
  log_sum = sum_over_warp(log_sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = log_sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    log_sum = T(0);
    for (unsigned w = 0; w < blockDim.x / 32; ++w) log_sum += partial[w];
  }
  return conclude(log_sum, good, finite);
}

// Copies the lower triangle of a matrix to packed shared memory, by a whole block; returns, in every thread,
// whether all its entries are finite.
template <typename T>
__device__ __forceinline__ bool stage_triangle(const Matrices<T>& g, std::int64_t i, T* a) {
  const T* from = g.sample(i);
  const int c = static_cast<int>(g.rows);
  bool finite = true;
  for (int e = threadIdx.x; e < c * c; e += blockDim.x) {
    const int row = e / c, col = e - row * c;
    if (col > row) continue;
    const T v = from[row * g.row_stride + col * g.col_stride];
    finite = finite && is_finite(v);
    a[packed(row, col)] = v;
  }
  return __syncthreads_and(finite);
}

}  // namespace flatkern::cuda
