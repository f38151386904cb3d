#include "tables.h"

#include <cstdio>
#include <cstdlib>

#ifdef FLATKERN_EMULATED_CUDA
#include "cuda/ghost.h"
#include "cuda/jets.h"
#include "cuda/kernels.h"
#endif

namespace tables {

#ifdef FLATKERN_EMULATED_CUDA
namespace {

using namespace flatkern;

void check(int error) {
  if (error == 0) return;
  std::printf("FAILED: a launch returned %d, %s\n", error, cuda::error_string(error));
  std::exit(1);
}

// A launch does all samples: the last range of them stands for it, and those before it for nothing.
template <typename T>
void spd_logdet(const Matrices<T>& g, std::int64_t, std::int64_t end, T* out) {
  if (end == g.batch.count()) check(cuda::spd_logdet<T>(g, out, nullptr));
}

template <typename T>
void spd_pullback(const Matrices<T>& g, const T* weight, std::int64_t, std::int64_t end, T* out) {
  if (end == g.batch.count()) check(cuda::spd_pullback<T>(g, weight, out, nullptr));
}

template <typename T>
void gram(const Matrices<T>& x, std::int64_t, std::int64_t end, double* out) {
  if (end == x.batch.count()) check(cuda::gram<T>(x, out, nullptr));
}

template <typename T>
void gram_stats(const Matrices<T>& x, std::int64_t, std::int64_t end, const GramStatsOut& out) {
  if (end == x.batch.count()) check(cuda::gram_stats<T>(x, out, nullptr));
}

template <typename T>
void gram_pullback(const Matrices<T>& x, const GramCotangents& g, std::int64_t, std::int64_t end, T* out) {
  if (end == x.batch.count()) check(cuda::gram_pullback<T>(x, g, out, nullptr));
}

template <typename T>
void gram_spectrum(const Matrices<T>& x, double floor, std::int64_t, std::int64_t end, double* values,
                   double* vectors) {
  if (end != x.batch.count()) return;
  std::vector<double> room(vectors ? 0 : static_cast<std::size_t>(x.batch.count() * x.rows * x.rows));
  check(cuda::gram_spectrum<T>(x, floor, vectors ? vectors : room.data(), values, vectors, nullptr));
}

template <typename T>
void ghost_norm(const GhostInput<T>& x, bool formed, std::int64_t, std::int64_t end, double* out) {
  const std::int64_t n = x.a.samples.count(), blocks = cuda::ghost_blocks(x, formed);
  if (end != n) return;
  std::vector<double> partial(static_cast<std::size_t>(x.cotangents * n * blocks));
  check(cuda::ghost_norm<T>(x, formed, blocks, partial.data(), out, nullptr));
}

template <typename Args>
void activation(const ActivationSpec& spec, const Args& args, std::int64_t n, std::int64_t,
                std::int64_t end) {
  if (end == cpu::jet_chunks(n)) check(cuda::run(spec, args, n, nullptr));
}

template <typename Args, typename Scratch>
void rows(const Args& args, std::int64_t, std::int64_t end, Scratch*) {
  if (end == args.rows) check(cuda::run(args, nullptr));
}

// What has no CUDA form stays the CPU's.
template <typename T>
cpu::TypedKernels<T> typed() {
  return {spd_logdet<T>,    spd_pullback<T>,           gram<T>,      gram_stats<T>, gram_pullback<T>,
          gram_spectrum<T>, cpu::kernels().of(T{}).lq, ghost_norm<T>};
}

template <typename E>
cpu::JetKernels<E> jets() {
  return {activation<ActivationDerivativesArgs<E>>,
          activation<ActivationJetArgs<E>>,
          activation<ActivationPullbackArgs<E>>,
          rows<SoftmaxCurvatureArgs<E>>,
          rows<LogSumExpArgs<E>>,
          rows<NormTangentArgs<E>>,
          rows<NormCurvatureArgs<E>>};
}

}  // namespace

const cpu::Kernels* named(const char*) {
  static const cpu::Kernels table = {"cuda",
                                     16,
                                     typed<float>(),
                                     typed<double>(),
                                     jets<float>(),
                                     jets<double>(),
                                     jets<Bf16>(),
                                     cpu::kernels().probes,
                                     cpu::kernels().scattered_f32,
                                     cpu::kernels().scattered_f64};
  return &table;
}
#else
const flatkern::cpu::Kernels* named(const char* name) {
  const flatkern::cpu::Kernels* table = flatkern::cpu::kernels_for(name);
  if (!table) std::printf("%s: not on this processor\n", name);
  return table;
}
#endif

}  // namespace tables
