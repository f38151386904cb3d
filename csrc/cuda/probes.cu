// Rows of random numbers and dots with sign rows: the numbers of philox.h, so the same as on the CPU. Dots
// are added up in an order that depends on the shapes alone.
#include "../common/philox.h"
#include "kernels.h"
#include "reduce.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

// Each lane draws one block of 128 signs; the warp then goes through its 32 blocks, four elements a lane.
template <typename F>
__device__ void warp_signs(std::uint64_t seed, std::uint64_t row, std::int64_t size, const F& f) {
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = (blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x) / 32;
  const std::int64_t warps = gridDim.x * static_cast<std::int64_t>(kThreads) / 32;
  for (std::int64_t first = warp * 32; first * kSignsPerBlock < size; first += warps * 32) {
    const Random4 mine = philox(seed, row, static_cast<std::uint64_t>(first + lane), Stream::kSigns);
    for (int b = 0; b < 32; ++b) {
      const std::int64_t j = (first + b) * kSignsPerBlock + 4 * lane;
      // elements 4 lane .. 4 lane + 3 of the block are four bits of one word
      const std::uint32_t w0 = __shfl_sync(kAll, mine.x[0], b), w1 = __shfl_sync(kAll, mine.x[1], b);
      const std::uint32_t w2 = __shfl_sync(kAll, mine.x[2], b), w3 = __shfl_sync(kAll, mine.x[3], b);
      const std::uint32_t word = lane < 16 ? (lane < 8 ? w0 : w1) : (lane < 24 ? w2 : w3);
      const std::uint32_t bits = word >> (4 * lane % 32);
      for (int e = 0; e < 4; ++e) {
        if (j + e < size) f(j + e, (bits >> e) & 1u);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rademacher_rows(std::uint64_t seed, std::uint64_t first, std::int64_t size, T* out) {
  T* to = out + blockIdx.y * size;
  warp_signs(seed, first + blockIdx.y, size,
             [&](std::int64_t j, std::uint32_t negative) { to[j] = negative ? T(-1) : T(1); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    normal_rows(std::uint64_t seed, std::uint64_t first, std::int64_t size, T* out) {
  T* to = out + blockIdx.y * size;
  const std::int64_t step = gridDim.x * static_cast<std::int64_t>(kThreads);
  for (std::int64_t b = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
       b * kNormalsPerBlock < size; b += step) {
    const Random4 r = philox(seed, first + blockIdx.y, static_cast<std::uint64_t>(b), Stream::kNormals);
    float y[4];
    normal_pair(r.x[0], r.x[1], &y[0], &y[1]);
    normal_pair(r.x[2], r.x[3], &y[2], &y[3]);
    for (int e = 0; e < 4; ++e) {
      if (b * kNormalsPerBlock + e < size) to[b * kNormalsPerBlock + e] = static_cast<T>(y[e]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sign_dots(std::uint64_t seed, std::uint64_t first, std::int64_t rows, std::int64_t size, const T* x,
              double* partial) {
  const T* from = x + blockIdx.y * size;
  double sum = 0;
  warp_signs(seed, first + blockIdx.y % rows, size, [&](std::int64_t j, std::uint32_t negative) {
    const double v = static_cast<double>(from[j]);
    sum += negative ? -v : v;
  });
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * static_cast<std::int64_t>(gridDim.x) + blockIdx.x] = sum;
}

}  // namespace

std::int64_t probe_blocks(std::int64_t size) {
  const std::int64_t blocks =
      (size + 32 * kSignsPerBlock * (kThreads / 32) - 1) / (32 * kSignsPerBlock * (kThreads / 32));
  return blocks < 1 ? 1 : (blocks < kMaxPartials ? blocks : kMaxPartials);
}

template <typename T>
int rademacher(std::uint64_t seed, std::uint64_t first, std::int64_t rows, std::int64_t size, T* out,
               void* stream) {
  return over_rows(rows, [&](std::int64_t begin, unsigned count) {
    const dim3 grid(static_cast<unsigned>(probe_blocks(size)), count);
    return launch_kernel(rademacher_rows<T>, grid, kThreads, 0, stream, seed,
                         first + static_cast<std::uint64_t>(begin), size, out + begin * size);
  });
}

template <typename T>
int normal(std::uint64_t seed, std::uint64_t first, std::int64_t rows, std::int64_t size, T* out,
           void* stream) {
  return over_rows(rows, [&](std::int64_t begin, unsigned count) {
    const dim3 grid(static_cast<unsigned>(probe_blocks(8 * size)), count);
    return launch_kernel(normal_rows<T>, grid, kThreads, 0, stream, seed,
                         first + static_cast<std::uint64_t>(begin), size, out + begin * size);
  });
}

template <typename T>
int rademacher_dots(std::uint64_t seed, std::uint64_t first, std::int64_t batch, std::int64_t rows,
                    std::int64_t size, const T* x, double* partial, double* out, void* stream) {
  const std::int64_t blocks = probe_blocks(size);
  // a launch never crosses a batch element: its rows start at `first` again
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t line = b * rows;
    const int error = over_rows(rows, [&](std::int64_t begin, unsigned count) {
      const dim3 grid(static_cast<unsigned>(blocks), count);
      return launch_kernel(sign_dots<T>, grid, kThreads, 0, stream, seed,
                           first + static_cast<std::uint64_t>(begin), rows, size, x + (line + begin) * size,
                           partial + (line + begin) * blocks);
    });
    if (error != 0) return error;
  }
  return join_partials(partial, blocks, batch * rows, false, out, stream);
}

#define FLATKERN_PROBES(T)                                                                                \
  template int rademacher<T>(std::uint64_t, std::uint64_t, std::int64_t, std::int64_t, T*, void*);        \
  template int normal<T>(std::uint64_t, std::uint64_t, std::int64_t, std::int64_t, T*, void*);            \
  template int rademacher_dots<T>(std::uint64_t, std::uint64_t, std::int64_t, std::int64_t, std::int64_t, \
                                  const T*, double*, double*, void*);
FLATKERN_PROBES(float)
FLATKERN_PROBES(double)

}  // namespace flatkern::cuda
