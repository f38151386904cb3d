// Derivatives of log-determinants and of the statistics of Gram matrices.
#include "gram_factor.cuh"
#include "kernels.h"

namespace flatkern::cuda {
namespace {

constexpr int kThreads = 256, kTile = 64, kDepth = 16;

// weight[i] times the inverse, a block a sample.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    spd_pullback_block(Matrices<T> g, const T* weight, std::int64_t n, T* out) {
  FLATKERN_DYNAMIC_SHARED(unsigned char, raw);
  __shared__ bool usable;
  T* a = reinterpret_cast<T*>(raw);
  const int c = static_cast<int>(g.rows);
  T* scratch = a + packed(c, 0);
  const T tolerance = spd_tolerance<T>(c);
  for (std::int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const bool finite = stage_triangle(g, i, a);
    const T value = ldl_block(a, scratch, c, tolerance, finite);
    if (threadIdx.x == 0) usable = is_finite(value);
    __syncthreads();
    const bool good = usable;
    for (int k = threadIdx.x; k < c; k += blockDim.x) scratch[k] = good ? T(1) / a[packed(k, k)] : T(0);
    __syncthreads();
    T* to = out + i * c * c;
    invert_columns(a, scratch, c, good, to);
    const T w = weight[i], nan = static_cast<T>(__int_as_float(0x7fffffff));
    const T other = w == T(0) ? T(0) : nan;
    for (int j = threadIdx.x; j < c; j += blockDim.x) {  // a column is its own thread's
      for (int k = 0; k < c; ++k) to[k * c + j] = good ? to[k * c + j] * w : other;
    }
    __syncthreads();
  }
}

// Rows and columns of 2 (g_tr I + 2 g_F G + g_ld G^-1) x, 64 by 64 a block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gram_pullback_tiles(Matrices<T> x, GramCotangents g, std::int64_t units, T* out) {
  __shared__ double left[kTile][kDepth + 1], right[kDepth][kTile + 1];
  const int c = static_cast<int>(x.rows), tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const std::int64_t across = (x.cols + kTile - 1) / kTile, down = (c + kTile - 1) / kTile;
  for (std::int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::int64_t i = unit / (across * down), d0 = unit % across * kTile;
    const int r0 = static_cast<int>(unit / across % down) * kTile;
    const T* from = x.sample(i);
    const double of_logdet = 2 * g.logdet[i], of_trace = 2 * g.trace[i], of_square = 4 * g.frobenius_sq[i];
    const double *gram = g.gram + i * c * c, *inverse = g.inverse + i * c * c;
    double sum[4][4] = {};
    for (int k0 = 0; k0 < c; k0 += kDepth) {
      for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) {
        const int row = e / kDepth, k = e % kDepth, at = (r0 + row) * c + k0 + k;
        double m = r0 + row == k0 + k ? of_trace : 0.0;
        if (r0 + row < c && k0 + k < c) {
          if (of_square != 0) m += of_square * gram[at];  // a weight of zero leaves out what is not finite
          if (of_logdet != 0) m += of_logdet * inverse[at];
        }
        left[row][k] = m;
        const int line = e / kTile, col = e % kTile;
        const bool inside = k0 + line < c && d0 + col < x.cols;
        right[line][col] =
            inside ? static_cast<double>(from[(k0 + line) * x.row_stride + (d0 + col) * x.col_stride]) : 0.0;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        double b[4];
#pragma unroll
        for (int s = 0; s < 4; ++s) b[s] = right[k][tx + 16 * s];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const double a = left[ty + 16 * r][k];
#pragma unroll
          for (int s = 0; s < 4; ++s) sum[r][s] += a * b[s];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const std::int64_t row = r0 + ty + 16 * r, col = d0 + tx + 16 * s;
        if (row < c && col < x.cols) out[(i * c + row) * x.cols + col] = static_cast<T>(sum[r][s]);
      }
    }
  }
}

}  // namespace

template <typename T>
int spd_pullback(const Matrices<T>& g, const T* weight, T* out, void* stream) {
  const std::int64_t n = g.batch.count(), c = g.rows;
  if (n == 0 || c == 0) return 0;
  const std::size_t bytes = static_cast<std::size_t>(packed(c, 0) + c + 32) * sizeof(T);
  const unsigned threads = c <= 32 ? 32 : c <= 64 ? 64 : kThreads;
  return launch_kernel(spd_pullback_block<T>, blocks_for(n), threads, bytes, stream, g, weight, n, out);
}

template <typename T>
int gram_pullback(const Matrices<T>& x, const GramCotangents& g, T* out, void* stream) {
  const std::int64_t across = (x.cols + kTile - 1) / kTile, down = (x.rows + kTile - 1) / kTile;
  const std::int64_t units = x.batch.count() * across * down;
  if (units == 0) return 0;
  return launch_kernel(gram_pullback_tiles<T>, blocks_for(units), kThreads, 0, stream, x, g, units, out);
}

#define FLATKERN_INSTANTIATE(T)                                          \
  template int spd_pullback<T>(const Matrices<T>&, const T*, T*, void*); \
  template int gram_pullback<T>(const Matrices<T>&, const GramCotangents&, T*, void*);
FLATKERN_INSTANTIATE(float)
FLATKERN_INSTANTIATE(double)

}  // namespace flatkern::cuda
