// Squared norms of sum_t g_kt a_t^T: tiles of 64 x 64, four by four a thread, operands staged in shared
// memory. A block takes tiles in turn and keeps one partial sum a cotangent; partial sums are joined in a
// fixed order.
#include "ghost.h"
#include "reduce.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kSide = kGhostSide, kDepth = 16, kThreads = 256, kOwn = 4, kPitch = kSide + 4, kOffsets = 64;

template <typename T>
struct Factor {
  const T* data;
  const Batch& rows;
  const Batch& depth;
  std::int64_t first, count;  // rows [first, count) exist
};

// Staged operands, and offsets of the depths: found once for all rows, since they may take divisions.
template <typename T>
struct Stage {
  T left[kDepth][kPitch], right[kDepth][kPitch];
  std::int64_t at[2][kOffsets];
};

// acc[r][c] = sum over the depth of x_{first + row} y_{first + col}, rows and columns 16 apart.
template <typename T>
__device__ __forceinline__ void tile_product(const Factor<T>& x, const Factor<T>& y, std::int64_t depth,
                                             Stage<T>& stage, T (&acc)[kOwn][kOwn]) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) acc[r][c] = T(0);
  }
  // a thread stages one row of each factor, four depths of every sixteen
  const int row = threadIdx.x % kSide, part = threadIdx.x / kSide;
  const bool have_x = x.first + row < x.count, have_y = y.first + row < y.count;
  const T* from_x = x.data + (have_x ? x.rows.offset(x.first + row) : 0);
  const T* from_y = y.data + (have_y ? y.rows.offset(y.first + row) : 0);
#pragma unroll 1
  for (std::int64_t k0 = 0; k0 < depth; k0 += kOffsets) {
    const int have = static_cast<int>(depth - k0 < kOffsets ? depth - k0 : kOffsets);
    if (threadIdx.x < have) {
      stage.at[0][threadIdx.x] = x.depth.offset(k0 + threadIdx.x);
      stage.at[1][threadIdx.x] = y.depth.offset(k0 + threadIdx.x);
    }
    __syncthreads();
#pragma unroll 1
    for (int k1 = 0; k1 < have; k1 += kDepth) {
#pragma unroll
      for (int e = 0; e < kDepth * kSide / kThreads; ++e) {
        const int k = part + e * (kThreads / kSide);
        const bool inside = k1 + k < have;
        stage.left[k][row] = inside && have_x ? from_x[stage.at[0][k1 + k]] : T(0);
        stage.right[k][row] = inside && have_y ? from_y[stage.at[1][k1 + k]] : T(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        T b[kOwn];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) b[c] = stage.right[k][tx + 16 * c];
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
          const T a = stage.left[k][ty + 16 * r];
#pragma unroll
          for (int c = 0; c < kOwn; ++c) acc[r][c] += a * b[c];
        }
      }
      __syncthreads();
    }
  }
}

// Blocks: (partial sum, cotangent and sample).
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    ghost_formed(const __grid_constant__ GhostInput<T> x, std::int64_t n, std::int64_t first_line,
                 double* partial) {
  __shared__ Stage<T> stage;
  const std::int64_t line = first_line + blockIdx.y, k = line / n, i = line % n;
  const T* a = x.a.data + x.a.samples.offset(i);
  const T* g = x.g.data + x.g.samples.offset(i) + k * x.cotangent_stride;
  const std::int64_t across = (x.d_in + kSide - 1) / kSide, down = (x.d_out + kSide - 1) / kSide;
  double sum = 0;
  for (std::int64_t tile = blockIdx.x; tile < across * down; tile += gridDim.x) {
    T acc[kOwn][kOwn];
    tile_product<T>({g, x.g.features, x.g.positions, tile / across * kSide, x.d_out},
                    {a, x.a.features, x.a.positions, tile % across * kSide, x.d_in}, x.positions, stage, acc);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) sum += static_cast<double>(acc[r][c]) * static_cast<double>(acc[r][c]);
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[line * gridDim.x + blockIdx.x] = sum;
}

// Blocks: (partial sum, sample); a tile of A A^T stays in registers while the cotangents pass.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    ghost_gram(const __grid_constant__ GhostInput<T> x, std::int64_t n, std::int64_t first, double* partial) {
  __shared__ Stage<T> stage;
  const std::int64_t i = first + blockIdx.y;
  const T* a = x.a.data + x.a.samples.offset(i);
  const T* g = x.g.data + x.g.samples.offset(i);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const std::int64_t side = (x.positions + kSide - 1) / kSide;
  std::int64_t index = 0;
  bool begun = false;
  for (std::int64_t t = 0; t < side; ++t) {
    for (std::int64_t s = t; s < side; ++s, ++index) {
      if (index % gridDim.x != blockIdx.x) continue;
      T inputs[kOwn][kOwn];
      tile_product<T>({a, x.a.positions, x.a.features, t * kSide, x.positions},
                      {a, x.a.positions, x.a.features, s * kSide, x.positions}, x.d_in, stage, inputs);
      for (std::int64_t k = 0; k < x.cotangents; ++k) {
        const T* of = g + k * x.cotangent_stride;
        T acc[kOwn][kOwn];
        tile_product<T>({of, x.g.positions, x.g.features, t * kSide, x.positions},
                        {of, x.g.positions, x.g.features, s * kSide, x.positions}, x.d_out, stage, acc);
        double sum = 0;
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
#pragma unroll
          for (int c = 0; c < kOwn; ++c) {
            const std::int64_t over = (s - t) * kSide + tx + 16 * c - ty - 16 * r;
            const double weight = over > 0 ? 2 : (over == 0 ? 1 : 0);
            sum += weight * static_cast<double>(acc[r][c]) * static_cast<double>(inputs[r][c]);
          }
        }
        sum = block_sum<kThreads>(sum);
        if (threadIdx.x == 0) {
          double* to = partial + (k * n + i) * gridDim.x + blockIdx.x;
          *to = begun ? *to + sum : sum;
        }
      }
      begun = true;
    }
  }
}

}  // namespace

template <typename T>
int ghost_norm(const GhostInput<T>& x, bool formed, std::int64_t blocks, double* partial, double* out,
               void* stream) {
  const std::int64_t n = x.a.samples.count(), lines = x.cotangents * n;
  if (lines == 0) return 0;
  if (x.positions == 0 || x.d_in == 0 || x.d_out == 0) {
    return static_cast<int>(cudaMemsetAsync(out, 0, static_cast<std::size_t>(lines) * sizeof(double),
                                            static_cast<cudaStream_t>(stream)));
  }
  const int error = over_rows(formed ? lines : n, [&](std::int64_t begin, unsigned count) {
    const dim3 grid(static_cast<unsigned>(blocks), count);
    return launch_kernel(formed ? ghost_formed<T> : ghost_gram<T>, grid, kThreads, 0, stream, x, n, begin,
                         partial);
  });
  return error ? error : join_partials(partial, blocks, lines, false, out, stream);
}

template int ghost_norm<float>(const GhostInput<float>&, bool, std::int64_t, double*, double*, void*);
template int ghost_norm<double>(const GhostInput<double>&, bool, std::int64_t, double*, double*, void*);

}  // namespace flatkern::cuda
