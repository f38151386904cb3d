// Cross-entropy with its terms along tangents, those of norms, and the second-order term of softmax: a block
// a row (rows strided over the grid), sums by shuffles and one word a warp of shared memory. A row is read
// again for every pass, from the caches where it fits; four passes over a tangent's row at most.
#include "jets.h"
#include "launch.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Largest {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Combines x over the block; every thread gets the result. blockDim.x is a multiple of 32.
template <typename T, typename Op>
__device__ __forceinline__ T over_block(T x, const Op& op) {
  __shared__ T parts[kMostThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, step));
  const int warps = blockDim.x / 32;
  __syncthreads();  // what was here before has been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  T all = parts[0];
  for (int w = 1; w < warps; ++w) all = op(all, parts[w]);
  return all;
}

// The sum of f(column) over the columns of the row.
template <typename T, typename F>
__device__ __forceinline__ T total(std::int64_t n, const F& f) {
  T sum = T(0);
  for (std::int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += f(i);
  return over_block(sum, Add{});
}

template <typename F>
__device__ __forceinline__ void each(std::int64_t n, const F& f) {
  for (std::int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
}

// The largest entry of a row and the lowest place where it stands.
template <typename E>
__device__ __forceinline__ wide_t<E> peak(const E* z, std::int64_t n, std::int64_t* place) {
  typedef wide_t<E> T;
  T best = -static_cast<T>(__int_as_float(0x7f800000));
  for (std::int64_t i = threadIdx.x; i < n; i += blockDim.x) best = Largest{}(best, widen(z[i]));
  best = over_block(best, Largest{});
  long long first = 0;  // the negative place, so that the largest is the first
  if (place) {
    first = -static_cast<long long>(n);
    for (std::int64_t i = threadIdx.x; i < n && first == -static_cast<long long>(n); i += blockDim.x) {
      if (widen(z[i]) == best) first = -static_cast<long long>(i);
    }
    first = over_block(first, Largest{});
    *place = first == -static_cast<long long>(n) ? 0 : -first;
  }
  return best;
}

template <typename E>
__global__ void __launch_bounds__(kMostThreads) softmax_curvature_rows(SoftmaxCurvatureArgs<E> a) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  for (std::int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const E *p = a.p + r * n, *g = a.g + r * n;
    const T along =
        total<T>(n, [&](std::int64_t i) { return a.log ? T(widen(g[i])) : T(widen(p[i]) * widen(g[i])); });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const E* t = a.t + (j * a.rows + r) * n;
      const T mean = total<T>(n, [&](std::int64_t i) { return widen(p[i]) * widen(t[i]); });
      const T bent = total<T>(n, [&](std::int64_t i) {
        const T c = widen(t[i]) - mean, q = widen(p[i]) * c * c;
        return a.log ? q : T(q * (widen(g[i]) - along));
      });
      if (threadIdx.x == 0) a.curvature[j * a.rows + r] = a.log ? -along * bent : bent;
    }
  }
}

template <typename E>
__global__ void __launch_bounds__(kMostThreads) logsumexp_rows(LogSumExpArgs<E> a) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  for (std::int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const E* z = a.z + r * n;
    std::int64_t place = 0;
    const T top = peak(z, n, &place);
    const auto e = [&](std::int64_t i) { return weight_of(widen(z[i]) - top); };
    const T rest = total<T>(n, [&](std::int64_t i) { return i == place ? T(0) : e(i); });
    const T own = e(place), per = T(1) / (own + rest), scale = a.scale ? a.scale[r] : T(1);
    if (a.excess && threadIdx.x == 0) a.excess[r] = log1p(rest + (own - T(1)));
    if (a.gradient) {
      E* gradient = a.gradient + r * n;
      each(n, [&](std::int64_t i) { narrow(e(i) * (per * scale), gradient + i); });
    }
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E* v = a.v + at;
      const T origin = widen(v[place]);
      const T offset = per * total<T>(n, [&](std::int64_t i) { return e(i) * (widen(v[i]) - origin); });
      each(n, [&](std::int64_t i) {
        narrow(e(i) * (per * scale) * ((widen(v[i]) - origin) - offset), a.product + at + i);
      });
    }
  }
}

template <typename E>
__device__ __forceinline__ wide_t<E> mean_of(const E* row, std::int64_t n) {
  typedef wide_t<E> T;
  return total<T>(n, [&](std::int64_t i) { return widen(row[i]); }) / static_cast<T>(n);
}

template <typename E>
__global__ void __launch_bounds__(kMostThreads) norm_tangent_rows(NormTangentArgs<E> a) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  const T per = T(1) / static_cast<T>(n);
  for (std::int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const E* unit = a.unit + r * n;
    const T inverse = a.inverse[r];
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t at = (j * a.rows + r) * n;
      const E* t = a.t + at;
      const T mean = mean_of(t, n);
      const T p = per * total<T>(n, [&](std::int64_t i) { return widen(unit[i]) * (widen(t[i]) - mean); });
      each(n, [&](std::int64_t i) {
        const T w = (widen(t[i]) - mean - widen(unit[i]) * p) * inverse;
        narrow(a.weight ? w * widen(a.weight[i]) : w, a.tangent + at + i);
      });
    }
  }
}

template <typename E>
__global__ void __launch_bounds__(kMostThreads) norm_curvature_rows(NormCurvatureArgs<E> a) {
  typedef wide_t<E> T;
  const std::int64_t n = a.cols;
  const T per = T(1) / static_cast<T>(n);
  for (std::int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const E *unit = a.unit + r * n, *g = a.g + r * n;
    const auto h = [&](std::int64_t i) { return a.weight ? widen(g[i]) * widen(a.weight[i]) : widen(g[i]); };
    const T along = total<T>(n, [&](std::int64_t i) { return widen(unit[i]) * h(i); });
    const T inverse = a.inverse[r];
    for (std::int64_t j = 0; j < a.k; ++j) {
      const E* t = a.t + (j * a.rows + r) * n;
      const T mean = mean_of(t, n);
      const T p = per * total<T>(n, [&](std::int64_t i) { return widen(unit[i]) * (widen(t[i]) - mean); });
      const T q = per * total<T>(n, [&](std::int64_t i) {
                    const T c = widen(t[i]) - mean;
                    return c * c;
                  });
      const T across = total<T>(n, [&](std::int64_t i) { return h(i) * (widen(t[i]) - mean); });
      if (threadIdx.x == 0) {
        a.curvature[j * a.rows + r] = inverse * inverse * (along * (T(3) * p * p - q) - T(2) * p * across);
      }
    }
  }
}

template <typename Args>
int launch(void (*kernel)(Args), const Args& args, void* stream) {
  if (args.rows == 0 || args.cols == 0) return 0;
  const std::int64_t whole = (args.cols + 31) / 32 * 32;
  const unsigned threads = static_cast<unsigned>(whole < kMostThreads ? whole : kMostThreads);
  return launch_kernel(kernel, blocks_for(args.rows), threads, 0, stream, args);
}

}  // namespace

template <typename E>
int run(const SoftmaxCurvatureArgs<E>& args, void* stream) {
  return launch(softmax_curvature_rows<E>, args, stream);
}

template <typename E>
int run(const LogSumExpArgs<E>& args, void* stream) {
  return launch(logsumexp_rows<E>, args, stream);
}

template <typename E>
int run(const NormTangentArgs<E>& args, void* stream) {
  return launch(norm_tangent_rows<E>, args, stream);
}

template <typename E>
int run(const NormCurvatureArgs<E>& args, void* stream) {
  return launch(norm_curvature_rows<E>, args, stream);
}

#define FLATKERN_INSTANTIATE(E)                               \
  template int run<E>(const SoftmaxCurvatureArgs<E>&, void*); \
  template int run<E>(const LogSumExpArgs<E>&, void*);        \
  template int run<E>(const NormTangentArgs<E>&, void*);      \
  template int run<E>(const NormCurvatureArgs<E>&, void*);
FLATKERN_INSTANTIATE(float)
FLATKERN_INSTANTIATE(double)
FLATKERN_INSTANTIATE(Bf16)

}  // namespace flatkern::cuda
