// Activations and their terms along tangents: a chunk of the primal is evaluated into the first-level cache, then
// every tangent's piece goes by. So each kind of activation is compiled once a type, whatever is done with it.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace flatkern::cpu::FLATKERN_ISA {

template <typename T>
struct ChunkOfThree {
  alignas(64) T value[kJetChunk], slope[kJetChunk], bend[kJetChunk];
};

template <Activation kind, typename E>
void evaluate(const ActivationSpec& spec, const E* z, std::int64_t count, ChunkOfThree<wide_t<E>>& out) {
  typedef wide_t<E> T;
  constexpr int width = lanes<E>;
  const auto put = [&](std::int64_t i, V<T> v) __attribute__((always_inline)) {
    const Three<V<T>> f = three<kind>(v, spec);
    store<T>(out.value + i, f.value);
    store<T>(out.slope + i, f.slope);
    store<T>(out.bend + i, f.bend);
  };
  std::int64_t i = 0;
  for (; i + width <= count; i += width) put(i, read(z + i));
  if (i < count) put(i, read_some(z + i, static_cast<int>(count - i), T(0)));
}

template <typename E>
void evaluate(const ActivationSpec& spec, const E* z, std::int64_t count, ChunkOfThree<wide_t<E>>& out) {
  switch (spec.kind) {
    case Activation::relu:
      return evaluate<Activation::relu>(spec, z, count, out);
    case Activation::gelu:
      return evaluate<Activation::gelu>(spec, z, count, out);
    case Activation::gelu_tanh:
      return evaluate<Activation::gelu_tanh>(spec, z, count, out);
    case Activation::silu:
      return evaluate<Activation::silu>(spec, z, count, out);
    case Activation::tanh:
      return evaluate<Activation::tanh>(spec, z, count, out);
    case Activation::sigmoid:
      return evaluate<Activation::sigmoid>(spec, z, count, out);
    case Activation::softplus:
      return evaluate<Activation::softplus>(spec, z, count, out);
    case Activation::elu:
      return evaluate<Activation::elu>(spec, z, count, out);
    case Activation::count:
      return;
  }
}

// out[i] = f(i) for the entries of a chunk, f giving vectors from the place of an entry and how many of them count
// (0: all). Large results pass the caches by.
template <typename E, typename F>
FLATKERN_INLINE void put(E* out, std::int64_t count, bool past_caches, const F& f) {
  constexpr int width = lanes<E>;
  std::int64_t i = 0;
  if (past_caches && reinterpret_cast<std::uintptr_t>(out) % FLATKERN_VECTOR_BYTES == 0) {
    for (; i + width <= count; i += width) stream(out + i, f(i, 0));
  } else {
    for (; i + width <= count; i += width) write(out + i, f(i, 0));
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    write_some(out + i, rest, f(i, rest));
  }
}

template <typename E>
FLATKERN_INLINE W<E> take(const E* p, std::int64_t i, int some) {
  return some ? read_some(p + i, some, wide_t<E>(0)) : read(p + i);
}

template <typename E>
void activation_derivatives(const ActivationSpec& spec, const ActivationDerivativesArgs<E>& a, std::int64_t n,
                            std::int64_t begin, std::int64_t end) {
  typedef wide_t<E> T;
  ChunkOfThree<T> f;
  const bool past = static_cast<std::int64_t>(sizeof(E)) * 3 * n >= kPastCaches;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const std::int64_t at = chunk * kJetChunk, count = n - at < kJetChunk ? n - at : kJetChunk;
    evaluate(spec, a.z + at, count, f);
    put(a.value + at, count, past, [&](std::int64_t i, int) { return load<T>(f.value + i); });
    put(a.slope + at, count, past, [&](std::int64_t i, int) { return load<T>(f.slope + i); });
    put(a.bend + at, count, past, [&](std::int64_t i, int) { return load<T>(f.bend + i); });
  }
  if (past) stream_end();
}

template <typename E>
void activation_jet(const ActivationSpec& spec, const ActivationJetArgs<E>& a, std::int64_t n, std::int64_t begin,
                    std::int64_t end) {
  typedef wide_t<E> T;
  ChunkOfThree<T> f;
  const std::int64_t outputs = 1 + a.k * (a.second ? 2 : 1);
  const bool past = static_cast<std::int64_t>(sizeof(E)) * outputs * n >= kPastCaches;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const std::int64_t at = chunk * kJetChunk, count = n - at < kJetChunk ? n - at : kJetChunk;
    evaluate(spec, a.z + at, count, f);
    put(a.value + at, count, past, [&](std::int64_t i, int) { return load<T>(f.value + i); });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const std::int64_t from = j * n + at;
      const E* t = a.t + from;
      put(a.first + from, count, past,
          [&](std::int64_t i, int some) { return load<T>(f.slope + i) * take(t, i, some); });
      if (!a.second) continue;
      if (a.s) {
        const E* s = a.s + from;
        put(a.second + from, count, past, [&](std::int64_t i, int some) {
          const V<T> x = take(t, i, some);
          return load<T>(f.bend + i) * x * x + load<T>(f.slope + i) * take(s, i, some);
        });
      } else {
        put(a.second + from, count, past, [&](std::int64_t i, int some) {
          const V<T> x = take(t, i, some);
          return load<T>(f.bend + i) * x * x;
        });
      }
    }
  }
  if (past) stream_end();
}

template <typename E>
void activation_pullback(const ActivationSpec& spec, const ActivationPullbackArgs<E>& a, std::int64_t n,
                         std::int64_t begin, std::int64_t end) {
  typedef wide_t<E> T;
  ChunkOfThree<T> f;
  const bool past = static_cast<std::int64_t>(sizeof(E)) * (1 + a.k) * n >= kPastCaches;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const std::int64_t at = chunk * kJetChunk, count = n - at < kJetChunk ? n - at : kJetChunk;
    evaluate(spec, a.z + at, count, f);
    const E* g = a.g + at;
    put(a.cotangent + at, count, past, [&](std::int64_t i, int some) {
      const V<T> x = take(g, i, some);
      store<T>(f.bend + i, load<T>(f.bend + i) * x);  // g f'' for the tangents
      return load<T>(f.slope + i) * x;
    });
    for (std::int64_t j = 0; j < a.k; ++j) {
      const E *t = a.t + j * n + at, *dg = a.dg + j * n + at;
      put(a.tangents + j * n + at, count, past, [&](std::int64_t i, int some) {
        return load<T>(f.slope + i) * take(dg, i, some) + load<T>(f.bend + i) * take(t, i, some);
      });
    }
  }
  if (past) stream_end();
}

}  // namespace flatkern::cpu::FLATKERN_ISA
