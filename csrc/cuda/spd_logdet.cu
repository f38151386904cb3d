// Log-determinants: up to 32 rows a group of lanes a sample, up to 128 a block a sample.
#include "kernels.h"
#include "launch.cuh"
#include "ldl.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kWarps = 4;

// C lanes a sample, so 32 / C samples a warp. The triangle goes through shared memory to be read in order.
template <typename T, int C>
__global__ void __launch_bounds__(32 * kWarps) spd_logdet_lanes(Matrices<T> g, std::int64_t n, T* out) {
  constexpr int groups = 32 / C;
  __shared__ T room[kWarps * groups][C * (C + 1)];
  const int c = static_cast<int>(g.rows), lane = threadIdx.x % C, slot = threadIdx.x / C;
  T* staged = room[slot];
  const T tolerance = spd_tolerance<T>(c);
  const std::int64_t per_block = kWarps * groups;
  // every lane of a warp stays to the end: the shuffles need them all
  for (std::int64_t base = blockIdx.x * per_block; base < n; base += gridDim.x * per_block) {
    const std::int64_t i = base + slot;
    bool finite = true;
    if (i < n) {
      const T* from = g.sample(i);
      for (int e = lane; e < c * c; e += C) {
        const int row = e / c, col = e - row * c;
        if (col <= row) {
          const T v = from[row * g.row_stride + col * g.col_stride];
          finite = finite && is_finite(v);
          staged[row * (C + 1) + col] = v;
        }
      }
    }
    __syncwarp();
    T a[C];
#pragma unroll
    for (int j = 0; j < C; ++j) a[j] = (i < n && lane < c && j <= lane) ? staged[lane * (C + 1) + j] : T(0);
    const unsigned bad = __ballot_sync(kAllLanes, !finite);
    const unsigned mine = (C == 32 ? kAllLanes : (1u << (C % 32)) - 1) << (threadIdx.x % 32 / C * C);
    const T value = ldl_lanes<T, C>(a, c, tolerance, (bad & mine) == 0);
    if (i < n && lane == 0) out[i] = value;
    __syncwarp();
  }
}

template <typename T>
__global__ void __launch_bounds__(256) spd_logdet_block(Matrices<T> g, std::int64_t n, T* out) {
  FLATKERN_DYNAMIC_SHARED(unsigned char, raw);
  T* a = reinterpret_cast<T*>(raw);
  const int c = static_cast<int>(g.rows);
  T* scratch = a + packed(c, 0);
  const T tolerance = spd_tolerance<T>(c);
  for (std::int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const bool finite = stage_triangle(g, i, a);
    const T value = ldl_block(a, scratch, c, tolerance, finite);
    if (threadIdx.x == 0) out[i] = value;
    __syncthreads();
  }
}

template <typename T, int C>
int launch_lanes(const Matrices<T>& g, std::int64_t n, T* out, void* stream) {
  constexpr int per_block = kWarps * (32 / C);
  return launch_kernel(spd_logdet_lanes<T, C>, blocks_for((n + per_block - 1) / per_block), 32 * kWarps, 0,
                       stream, g, n, out);
}

}  // namespace

template <typename T>
int spd_logdet(const Matrices<T>& g, T* out, void* stream) {
  const std::int64_t n = g.batch.count(), c = g.rows;
  if (n == 0) return 0;
  if (c <= 4) return launch_lanes<T, 4>(g, n, out, stream);
  if (c <= 8) return launch_lanes<T, 8>(g, n, out, stream);
  if (c <= 16) return launch_lanes<T, 16>(g, n, out, stream);
  if (c <= 32) return launch_lanes<T, 32>(g, n, out, stream);
  const std::size_t bytes = static_cast<std::size_t>(packed(c, 0) + c + 32) * sizeof(T);
  return launch_kernel(spd_logdet_block<T>, blocks_for(n), 256, bytes, stream, g, n, out);
}

template int spd_logdet<float>(const Matrices<float>&, float*, void*);
template int spd_logdet<double>(const Matrices<double>&, double*, void*);

const char* error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace flatkern::cuda
