// Activations and their terms along tangents: a thread takes sixteen bytes of the primal, evaluates them once
// and goes over the tangents; entry by entry where the rows are not aligned to that.
#include <cstdint>
#include <initializer_list>

#include "jets.h"
#include "launch.cuh"

namespace flatkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = most_blocks(1 << 20);

template <typename E, int count>
struct alignas(sizeof(E) * count) Pack {
  E at[count];
};

template <typename E, int count>
__device__ __forceinline__ void get(const E* p, wide_t<E> (&to)[count]) {
  const auto pack = *reinterpret_cast<const Pack<E, count>*>(p);
#pragma unroll
  for (int c = 0; c < count; ++c) to[c] = widen(pack.at[c]);
}

template <typename E, int count, typename F>
__device__ __forceinline__ void set(E* p, const F& f) {
  Pack<E, count> pack;
#pragma unroll
  for (int c = 0; c < count; ++c) narrow(f(c), &pack.at[c]);
  *reinterpret_cast<Pack<E, count>*>(p) = pack;
}

template <typename E, int count>
__device__ __forceinline__ void step(const ActivationSpec& spec, const ActivationDerivativesArgs<E>& a,
                                     std::int64_t, std::int64_t i) {
  typedef wide_t<E> T;
  T z[count];
  Three<T> f[count];
  get(a.z + i, z);
#pragma unroll
  for (int c = 0; c < count; ++c) f[c] = three(z[c], spec);
  set<E, count>(a.value + i, [&](int c) { return f[c].value; });
  set<E, count>(a.slope + i, [&](int c) { return f[c].slope; });
  set<E, count>(a.bend + i, [&](int c) { return f[c].bend; });
}

template <typename E, int count>
__device__ __forceinline__ void step(const ActivationSpec& spec, const ActivationJetArgs<E>& a,
                                     std::int64_t n, std::int64_t i) {
  typedef wide_t<E> T;
  T x[count], y[count];
  Three<T> f[count];
  get(a.z + i, x);
#pragma unroll
  for (int c = 0; c < count; ++c) f[c] = three(x[c], spec);
  set<E, count>(a.value + i, [&](int c) { return f[c].value; });
  for (std::int64_t at = i; at < a.k * n; at += n) {
    get(a.t + at, x);
    set<E, count>(a.first + at, [&](int c) { return f[c].slope * x[c]; });
    if (!a.second) continue;
    if (a.s) {
      get(a.s + at, y);
      set<E, count>(a.second + at, [&](int c) { return f[c].bend * x[c] * x[c] + f[c].slope * y[c]; });
    } else {
      set<E, count>(a.second + at, [&](int c) { return f[c].bend * x[c] * x[c]; });
    }
  }
}

template <typename E, int count>
__device__ __forceinline__ void step(const ActivationSpec& spec, const ActivationPullbackArgs<E>& a,
                                     std::int64_t n, std::int64_t i) {
  typedef wide_t<E> T;
  T x[count], y[count];
  Three<T> f[count];
  get(a.z + i, x);
  get(a.g + i, y);
#pragma unroll
  for (int c = 0; c < count; ++c) f[c] = three(x[c], spec);
  set<E, count>(a.cotangent + i, [&](int c) { return f[c].slope * y[c]; });
#pragma unroll
  for (int c = 0; c < count; ++c) f[c].bend *= y[c];
  for (std::int64_t at = i; at < a.k * n; at += n) {
    get(a.t + at, x);
    get(a.dg + at, y);
    set<E, count>(a.tangents + at, [&](int c) { return f[c].slope * y[c] + f[c].bend * x[c]; });
  }
}

template <typename E, int count, typename Args>
__global__ void __launch_bounds__(kThreads) jets(ActivationSpec spec, Args args, std::int64_t n) {
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * count;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads * count;
  for (std::int64_t i = first; i < n; i += stride) step<E, count>(spec, args, n, i);
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16) return false;
  }
  return true;
}

template <typename E, typename Args>
int launch(const ActivationSpec& spec, const Args& args, std::int64_t n, bool packs, void* stream) {
  if (n == 0) return 0;
  constexpr int count = 16 / sizeof(E);
  const std::int64_t each = packs && n % count == 0 ? count : 1;
  const std::int64_t wanted = (n / each + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  const auto kernel = each == count ? jets<E, count, Args> : jets<E, 1, Args>;
  return launch_kernel(kernel, blocks, kThreads, 0, stream, spec, args, n);
}

}  // namespace

template <typename E>
int run(const ActivationSpec& spec, const ActivationDerivativesArgs<E>& a, std::int64_t n, void* stream) {
  return launch<E>(spec, a, n, aligned({a.z, a.value, a.slope, a.bend}), stream);
}

template <typename E>
int run(const ActivationSpec& spec, const ActivationJetArgs<E>& a, std::int64_t n, void* stream) {
  return launch<E>(spec, a, n, aligned({a.z, a.t, a.s, a.value, a.first, a.second}), stream);
}

template <typename E>
int run(const ActivationSpec& spec, const ActivationPullbackArgs<E>& a, std::int64_t n, void* stream) {
  return launch<E>(spec, a, n, aligned({a.z, a.g, a.t, a.dg, a.cotangent, a.tangents}), stream);
}

#define FLATKERN_INSTANTIATE(E)                                                                         \
  template int run<E>(const ActivationSpec&, const ActivationDerivativesArgs<E>&, std::int64_t, void*); \
  template int run<E>(const ActivationSpec&, const ActivationJetArgs<E>&, std::int64_t, void*);         \
  template int run<E>(const ActivationSpec&, const ActivationPullbackArgs<E>&, std::int64_t, void*);
FLATKERN_INSTANTIATE(float)
FLATKERN_INSTANTIATE(double)
FLATKERN_INSTANTIATE(Bf16)

}  // namespace flatkern::cuda
