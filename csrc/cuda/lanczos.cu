// The three-term step of Lanczos for several rows: two passes over the vectors, four launches, nothing on the
// host. Sums are in double and in an order that depends on the shapes alone.
#include "kernels.h"
#include "reduce.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 16;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_dots(std::int64_t size, Strided<const T> x, Strided<const T> y, double* partial) {
  const T *a = x.row(blockIdx.y), *b = y.row(blockIdx.y);
  const std::int64_t step = gridDim.x * static_cast<std::int64_t>(kThreads);
  double sum = 0;
  for (std::int64_t j = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x; j < size; j += step) {
    sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * static_cast<std::int64_t>(gridDim.x) + blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    three_term(std::int64_t size, Strided<const T> image, Strided<const T> current, Strided<const T> previous,
               const double* alpha, const double* beta, Strided<T> residual, double* partial) {
  const T a = static_cast<T>(alpha[blockIdx.y]), b = static_cast<T>(beta[blockIdx.y]);
  const T *w = image.row(blockIdx.y), *v = current.row(blockIdx.y), *u = previous.row(blockIdx.y);
  T* r = residual.row(blockIdx.y);
  const std::int64_t step = gridDim.x * static_cast<std::int64_t>(kThreads);
  double sum = 0;
  for (std::int64_t j = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x; j < size; j += step) {
    const T value = (w[j] - a * v[j]) - b * u[j];
    r[j] = value;
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * static_cast<std::int64_t>(gridDim.x) + blockIdx.x] = sum;
}

}  // namespace

std::int64_t lanczos_blocks(std::int64_t size) {
  const std::int64_t blocks = (size + kThreads * kPerThread - 1) / (kThreads * kPerThread);
  return blocks < 1 ? 1 : (blocks < kMaxPartials ? blocks : kMaxPartials);
}

template <typename T>
int lanczos_step(std::int64_t rows, std::int64_t size, Strided<const T> image, Strided<const T> current,
                 Strided<const T> previous, const double* beta, Strided<T> residual, double* partial,
                 double* alpha, double* norm, void* stream) {
  const std::int64_t blocks = lanczos_blocks(size);
  int error = over_rows(rows, [&](std::int64_t begin, unsigned count) {
    const dim3 grid(static_cast<unsigned>(blocks), count);
    return launch_kernel(row_dots<T>, grid, kThreads, 0, stream, size, current.from(begin), image.from(begin),
                         partial + begin * blocks);
  });
  if (error != 0) return error;
  error = join_partials(partial, blocks, rows, false, alpha, stream);
  if (error != 0) return error;
  error = over_rows(rows, [&](std::int64_t begin, unsigned count) {
    const dim3 grid(static_cast<unsigned>(blocks), count);
    return launch_kernel(three_term<T>, grid, kThreads, 0, stream, size, image.from(begin),
                         current.from(begin), previous.from(begin), alpha + begin, beta + begin,
                         residual.from(begin), partial + begin * blocks);
  });
  if (error != 0) return error;
  return join_partials(partial, blocks, rows, true, norm, stream);
}

template int lanczos_step<float>(std::int64_t, std::int64_t, Strided<const float>, Strided<const float>,
                                 Strided<const float>, const double*, Strided<float>, double*, double*,
                                 double*, void*);
template int lanczos_step<double>(std::int64_t, std::int64_t, Strided<const double>, Strided<const double>,
                                  Strided<const double>, const double*, Strided<double>, double*, double*,
                                  double*, void*);

}  // namespace flatkern::cuda
