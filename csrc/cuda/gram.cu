// Gram matrices in double and their statistics: up to 32 rows a warp a sample, up to 128 a block a sample.
#include "gram_factor.cuh"
#include "kernels.h"
#include "ldl.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kDepth = 8;  // columns of x staged at a time

// What happens to a finished Gram matrix: written out, turned into its statistics, or both.
struct Output {
  double* gram;  // null: not wanted
  bool wants_stats;
  GramStatsOut stats;
  double tolerance;
  int missing;  // c - d where that is positive
};

__device__ __forceinline__ void write_stats(const Output& out, std::int64_t i, double logdet, double trace,
                                            double frobenius_sq, const PivotReport& report) {
  const double infinity = static_cast<double>(__int_as_float(0x7f800000));
  const bool finite = logdet == logdet;
  if (out.missing > 0 && finite) logdet = -infinity;
  out.stats.logdet[i] = logdet;
  out.stats.trace[i] = trace;
  out.stats.frobenius_sq[i] = frobenius_sq;
  out.stats.rank_deficient[i] = logdet == -infinity;
  out.stats.pivot_ratio[i] = finite ? report.ratio : logdet;
  out.stats.bad_pivots[i] = !finite ? 0 : report.bad > out.missing ? report.bad : out.missing;
}

// Eight by four lanes hold C / 8 by C / 4 sums each; the next columns travel while the present ones are used.
template <typename T, int C>
__global__ void __launch_bounds__(32 * kWarps) gram_warp(Matrices<T> x, std::int64_t n, Output out) {
  constexpr int rows = C / 8, cols = C / 4, pitch = kDepth + 1, loads = C * kDepth / 32;
  constexpr int staged = 2 * C * pitch, square = C * (C + 1);
  __shared__ double room[kWarps][staged > square ? staged : square];
  double* mine = room[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, lr = lane / 4, lc = lane % 4, c = static_cast<int>(x.rows);
  const std::int64_t d = x.cols;
  for (std::int64_t base = static_cast<std::int64_t>(blockIdx.x) * kWarps; base < n;
       base += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t i = base + threadIdx.x / 32;
    if (i >= n) continue;  // a whole warp at once
    const T* from = x.sample(i);
    double acc[rows][cols] = {};
    double next[loads];
    auto fetch = [&](std::int64_t d0) {
#pragma unroll
      for (int e = 0; e < loads; ++e) {
        const int row = (lane + 32 * e) / kDepth, col = (lane + 32 * e) % kDepth;
        const bool inside = row < c && d0 + col < d;
        next[e] = inside ? static_cast<double>(from[row * x.row_stride + (d0 + col) * x.col_stride]) : 0.0;
      }
    };
    auto put = [&](double* to) {
#pragma unroll
      for (int e = 0; e < loads; ++e) {
        to[(lane + 32 * e) / kDepth * pitch + (lane + 32 * e) % kDepth] = next[e];
      }
    };
    fetch(0);
    int which = 0;
    for (std::int64_t d0 = 0; d0 < d; d0 += kDepth) {
      double* tile = mine + which * C * pitch;
      put(tile);
      __syncwarp();
      if (d0 + kDepth < d) fetch(d0 + kDepth);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        double b[cols];
#pragma unroll
        for (int s = 0; s < cols; ++s) b[s] = tile[(lc + 4 * s) * pitch + k];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          const double a = tile[(lr + 8 * r) * pitch + k];
#pragma unroll
          for (int s = 0; s < cols; ++s) acc[r][s] += a * b[s];
        }
      }
      which ^= 1;  // the other buffer was last read before the barrier above
    }
    __syncwarp();
    double trace = 0, frobenius_sq = 0;
    bool finite = true;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int s = 0; s < cols; ++s) {
        const int row = lr + 8 * r, col = lc + 4 * s;
        const double v = acc[r][s];
        if (row == col) trace += v;
        frobenius_sq += v * v;
        finite = finite && is_finite(v);
        if (out.gram && row < c && col < c) out.gram[(i * c + row) * c + col] = v;
        mine[row * (C + 1) + col] = v;
      }
    }
    __syncwarp();
    if (out.wants_stats) {
      trace = sum_over_warp(trace);
      frobenius_sq = sum_over_warp(frobenius_sq);
      finite = __all_sync(kAllLanes, finite);
      double a[C];
      const int row = lane % C;
#pragma unroll
      for (int j = 0; j < C; ++j) a[j] = row < c && j <= row ? mine[row * (C + 1) + j] : 0.0;
      PivotReport report;
      const double logdet = ldl_lanes<double, C>(a, c, out.tolerance, finite, &report);
      if (lane == 0) write_stats(out, i, logdet, trace, frobenius_sq, report);
    }
    __syncwarp();
  }
}

// Sixteen by sixteen threads hold R x R sums each, rows and columns sixteen apart.
template <typename T, int R>
__global__ void __launch_bounds__(256) gram_block(Matrices<T> x, std::int64_t n, Output out) {
  constexpr int C = 16 * R, pitch = kDepth + 1;
  FLATKERN_DYNAMIC_SHARED(double, shared);
  __shared__ double sums[2][8];
  const int c = static_cast<int>(x.rows), tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const std::int64_t d = x.cols;
  double* tile = shared;
  double* triangle = tile + C * pitch;
  double* scratch = triangle + packed(c, 0);
  for (std::int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const T* from = x.sample(i);
    double acc[R][R] = {};
    for (std::int64_t d0 = 0; d0 < d; d0 += kDepth) {
      for (int e = threadIdx.x; e < C * kDepth; e += 256) {
        const int row = e / kDepth, col = e % kDepth;
        const bool inside = row < c && d0 + col < d;
        tile[row * pitch + col] =
            inside ? static_cast<double>(from[row * x.row_stride + (d0 + col) * x.col_stride]) : 0.0;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        double b[R];
#pragma unroll
        for (int s = 0; s < R; ++s) b[s] = tile[(tx + 16 * s) * pitch + k];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const double a = tile[(ty + 16 * r) * pitch + k];
#pragma unroll
          for (int s = 0; s < R; ++s) acc[r][s] += a * b[s];
        }
      }
      __syncthreads();
    }
    double trace = 0, frobenius_sq = 0;
    bool finite = true;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int s = 0; s < R; ++s) {
        const int row = ty + 16 * r, col = tx + 16 * s;
        const double v = acc[r][s];
        if (row == col) trace += v;
        frobenius_sq += v * v;
        finite = finite && is_finite(v);
        if (row < c && col < c) {
          if (out.gram) out.gram[(i * c + row) * c + col] = v;
          if (col <= row) triangle[packed(row, col)] = v;
        }
      }
    }
    if (out.wants_stats) {
      trace = sum_over_warp(trace);
      frobenius_sq = sum_over_warp(frobenius_sq);
      if (threadIdx.x % 32 == 0) {
        sums[0][threadIdx.x / 32] = trace;
        sums[1][threadIdx.x / 32] = frobenius_sq;
      }
      finite = __syncthreads_and(finite);
      PivotReport report;
      const double logdet = ldl_block(triangle, scratch, c, out.tolerance, finite, &report);
      if (threadIdx.x == 0) {
        trace = 0, frobenius_sq = 0;
        for (int w = 0; w < 8; ++w) trace += sums[0][w], frobenius_sq += sums[1][w];
        write_stats(out, i, logdet, trace, frobenius_sq, report);
      }
    }
    __syncthreads();
  }
}

template <typename T, int C>
int launch_warp(const Matrices<T>& x, std::int64_t n, const Output& out, void* stream) {
  return launch_kernel(gram_warp<T, C>, blocks_for((n + kWarps - 1) / kWarps), 32 * kWarps, 0, stream, x, n,
                       out);
}

template <typename T, int R>
int launch_block(const Matrices<T>& x, std::int64_t n, const Output& out, void* stream) {
  const std::int64_t values = 16 * R * (kDepth + 1) + packed(x.rows, 0) + x.rows + 32;
  return launch_kernel(gram_block<T, R>, blocks_for(n), 256,
                       static_cast<std::size_t>(values) * sizeof(double), stream, x, n, out);
}

template <typename T>
int launch(const Matrices<T>& x, const Output& out, void* stream) {
  const std::int64_t n = x.batch.count(), c = x.rows;
  if (n == 0) return 0;
  if (c <= 8) return launch_warp<T, 8>(x, n, out, stream);
  if (c <= 16) return launch_warp<T, 16>(x, n, out, stream);
  if (c <= 32) return launch_warp<T, 32>(x, n, out, stream);
  if (c <= 64) return launch_block<T, 4>(x, n, out, stream);
  return launch_block<T, 8>(x, n, out, stream);
}

}  // namespace

template <typename T>
int gram(const Matrices<T>& x, double* out, void* stream) {
  if (x.rows == 0) return 0;
  Output to{};
  to.gram = out;
  return launch(x, to, stream);
}

template <typename T>
int gram_stats(const Matrices<T>& x, const GramStatsOut& out, void* stream) {
  const std::int64_t missing = x.rows > x.cols ? x.rows - x.cols : 0;
  const double tolerance = gram_tolerance<T>(x.rows, x.cols);
  const int error = launch(x, Output{out.gram, true, out, tolerance, static_cast<int>(missing)}, stream);
  return error ? error : factor_again(x, out, stream);
}

template int gram<float>(const Matrices<float>&, double*, void*);
template int gram<double>(const Matrices<double>&, double*, void*);
template int gram_stats<float>(const Matrices<float>&, const GramStatsOut&, void*);
template int gram_stats<double>(const Matrices<double>&, const GramStatsOut&, void*);

}  // namespace flatkern::cuda
