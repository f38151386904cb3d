// Singular values and left singular vectors of the rows of small samples, a block a sample: the factor L of
// the Gram matrix L L^T, in double, or where it has lost digits anew from the rows in double-double; then
// rotations of L's rows until they are orthogonal. As many pairs of rows at a time as there are warps.
#include "../common/jacobi.h"
#include "gram_factor.cuh"
#include "kernels.h"

namespace flatkern::cuda {
namespace {

constexpr int kMostWarps = 8, kSweeps = 30;
// A pivot of the double-double factorization below this part of its diagonal entry is rounding; to leave its
// column out moves a row by 1e-15 of its length.
constexpr double kWidePivot = 1e-30;

struct Room {
  double *high, *low, *scratch, *l, *u;  // u: null where vectors are not wanted
  int pitch;
};

__host__ __device__ constexpr std::int64_t scratch_of(std::int64_t c) {
  return 2 * c + 32;
}

// Rows of l from a factor's triangle of u_ij = l_ij d_j, and rows of u from the identity.
__device__ __forceinline__ void start(const Room& room, int c, double tolerance) {
  for (int e = threadIdx.x; e < c * c; e += blockDim.x) {
    const int i = e / c, j = e - i * c;
    const double d = room.high[packed(j, j)];
    const bool there = j <= i && good_pivot(d, room.scratch[j], tolerance);
    room.l[i * room.pitch + j] = there ? room.high[packed(i, j)] / sqrt(d) : 0.0;
    if (room.u) room.u[i * room.pitch + j] = i == j ? 1.0 : 0.0;
  }
  __syncthreads();
}

// By a warp. Returns whether the rows were not orthogonal yet.
__device__ __forceinline__ bool rotate(const Room& room, int c, RowPair pair, double tolerance) {
  double* a = room.l + pair.i * room.pitch;
  double* b = room.l + pair.j * room.pitch;
  const int lane = threadIdx.x % 32;
  double aa = 0, bb = 0, ab = 0;
  for (int k = lane; k < c; k += 32) aa += a[k] * a[k], bb += b[k] * b[k], ab += a[k] * b[k];
  const Rotation by = rotation_of(sum_over_warp(aa), sum_over_warp(bb), sum_over_warp(ab), tolerance);
  if (!by.turns) return false;
  const auto turn = [&](double* x, double* y) {
    for (int k = lane; k < c; k += 32) by.apply(x[k], y[k]);
  };
  turn(a, b);
  if (room.u) turn(room.u + pair.i * room.pitch, room.u + pair.j * room.pitch);
  return true;
}

// Rotates until nothing turns; then scratch[0 .. c - 1] are the lengths of the rows.
__device__ __forceinline__ void orthogonalize(const Room& room, int c) {
  const double tolerance = jacobi_tolerance(c);
  const int even = c + c % 2, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool turned = false;
    for (int round = 0; round < even - 1; ++round) {
      for (int p = warp; p < even / 2; p += warps) {
        const RowPair pair = round_robin(even, round, p);
        if (pair.i < c) turned = rotate(room, c, pair, tolerance) || turned;
      }
      __syncthreads();
    }
    if (!__syncthreads_or(turned)) break;
  }
  for (int i = threadIdx.x; i < c; i += blockDim.x) {
    double sum = 0;
    for (int k = 0; k < c; ++k) sum += room.l[i * room.pitch + k] * room.l[i * room.pitch + k];
    room.scratch[i] = sqrt(sum);
  }
  __syncthreads();
}

// `grams` may be `vectors`: a block has read its matrix before it writes there.
template <typename T>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    spectrum_block(Matrices<T> x, std::int64_t n, double floor, const double* grams, double* values,
                   double* vectors) {
  FLATKERN_DYNAMIC_SHARED(double, shared);
  const int c = static_cast<int>(x.rows), entries = static_cast<int>(packed(c, 0));
  Room room;
  room.pitch = c | 1;
  room.high = shared;
  room.low = room.high + entries;
  room.scratch = room.low + entries;
  room.l = room.scratch + scratch_of(c);
  room.u = vectors ? room.l + c * room.pitch : nullptr;
  for (std::int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const double* g = grams + i * c * c;
    bool finite = true;
    for (int e = threadIdx.x; e < c * c; e += blockDim.x) {
      const int row = e / c, col = e - row * c;
      if (col > row) continue;
      finite = finite && is_finite(g[e]);
      room.high[packed(row, col)] = g[e];
    }
    finite = __syncthreads_and(finite);
    double* to = values + i * c;
    double* turned = vectors ? vectors + i * c * c : nullptr;
    if (!finite) {  // the same for the whole block
      const double nan = static_cast<double>(__int_as_float(0x7fffffff));
      for (int e = threadIdx.x; e < c; e += blockDim.x) to[e] = nan;
      for (int e = threadIdx.x; turned && e < c * c; e += blockDim.x) turned[e] = nan;
      continue;
    }
    PivotReport report;
    ldl_block(room.high, room.scratch, c, 0.0, true, &report);
    __syncthreads();
    bool lost = report.bad > 0 || report.ratio < lost_digits<T>();
    if (!lost) {
      start(room, c, 0.0);
      orthogonalize(room, c);
      double least = room.scratch[0], most = least;
      for (int k = 1; k < c; ++k) {
        least = room.scratch[k] < least ? room.scratch[k] : least;
        most = room.scratch[k] > most ? room.scratch[k] : most;
      }
      lost = least * least < most * most * floor;
      __syncthreads();  // everybody has read the lengths
    }
    if (lost) {
      wide_gram(x, x.sample(i), room.high, room.low, room.scratch);
      __syncthreads();
      PivotReport again;
      wide_ldl(room.high, room.low, room.scratch, c, kWidePivot, again);
      start(room, c, kWidePivot);
      orthogonalize(room, c);
    }
    double* places = room.scratch + c;
    for (int k = threadIdx.x; k < c; k += blockDim.x) {
      int place = 0;
      for (int other = 0; other < c; ++other) {
        const double mine = room.scratch[k], theirs = room.scratch[other];
        place += theirs > mine || (theirs == mine && other < k);
      }
      to[place] = room.scratch[k];
      places[k] = place;
    }
    __syncthreads();
    for (int e = threadIdx.x; turned && e < c * c; e += blockDim.x) {
      const int row = e / c, col = e - row * c;
      turned[static_cast<int>(places[row]) * c + col] = room.u[row * room.pitch + col];
    }
    __syncthreads();
  }
}

}  // namespace

template <typename T>
int gram_spectrum(const Matrices<T>& x, double floor, double* grams, double* values, double* vectors,
                  void* stream) {
  const std::int64_t n = x.batch.count(), c = x.rows;
  if (n == 0 || c == 0) return 0;
  const int failed = gram<T>(x, grams, stream);
  if (failed) return failed;
  const std::int64_t pairs = (c + 1) / 2, warps = pairs < kMostWarps ? pairs : kMostWarps;
  const std::int64_t numbers = 2 * packed(c, 0) + scratch_of(c) + (vectors ? 2 : 1) * c * (c | 1);
  return launch_kernel(spectrum_block<T>, blocks_for(n), static_cast<unsigned>(32 * warps),
                       static_cast<std::size_t>(numbers) * sizeof(double), stream, x, n, floor, grams, values,
                       vectors);
}

template int gram_spectrum<float>(const Matrices<float>&, double, double*, double*, double*, void*);
template int gram_spectrum<double>(const Matrices<double>&, double, double*, double*, double*, void*);

}  // namespace flatkern::cuda
