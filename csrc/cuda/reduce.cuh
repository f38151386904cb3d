// Sums in a fixed order: within a block, and over the partial sums of a row.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace flatkern::cuda {

constexpr std::int64_t kMaxPartials = most_blocks(1024);

// The sum over all threads, valid in thread 0; ends with every thread past its use of the shared room.
template <int threads>
__device__ double block_sum(double value) {
  __shared__ double room[threads / 32];
#pragma unroll
  for (int width = 16; width > 0; width /= 2) value += __shfl_down_sync(0xffffffffu, value, width);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < threads / 32; ++w) sum += room[w];
  }
  __syncthreads();
  return sum;
}

template <int threads>
__global__ void __launch_bounds__(threads)
    join_partials_kernel(const double* partial, std::int64_t blocks, bool root, double* out) {
  double sum = 0;
  for (std::int64_t b = threadIdx.x; b < blocks; b += threads) {
    sum += partial[blockIdx.x * blocks + b];
  }
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = root ? sqrt(sum) : sum;
}

// out[row] = the sum (or its root) of the row's partial sums.
inline int join_partials(const double* partial, std::int64_t blocks, std::int64_t rows, bool root,
                         double* out, void* stream) {
  if (rows == 0) return 0;
  return launch_kernel(join_partials_kernel<128>, static_cast<unsigned>(rows), 128, 0, stream, partial,
                       blocks, root, out);
}

// Launches for rows in the second dimension of the grid, which ends at 65,535. `launch` returns its error.
template <typename F>
int over_rows(std::int64_t rows, const F& launch) {
  constexpr std::int64_t kMost = most_blocks(65535);
  for (std::int64_t begin = 0; begin < rows; begin += kMost) {
    const std::int64_t left = rows - begin;
    const int error = launch(begin, static_cast<unsigned>(left < kMost ? left : kMost));
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace flatkern::cuda
