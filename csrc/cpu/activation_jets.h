// Activations and their terms along tangents, chunk by chunk of the primal: the first tangent is served while
// the chunk is evaluated, for the others its derivatives stay in the first-level cache.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace flatkern::cpu::FLATKERN_ISA {

// What is kept of a chunk for the tangents after the first.
template <typename T>
struct Kept {
  alignas(64) T slope[kJetChunk], bend[kJetChunk];
};

template <typename E>
FLATKERN_INLINE W<E> take(const E* p, std::int64_t i, int some) {
  return some ? read_some(p + i, some, wide_t<E>(0)) : read(p + i);
}

// A result's piece: the first `some` lanes (0: all), past the caches where the result is large.
template <typename E>
struct Out {
  E* to;
  bool past;

  Out(E* start, bool large)
      : to(start), past(large && reinterpret_cast<std::uintptr_t>(start) % FLATKERN_VECTOR_BYTES == 0) {}

  FLATKERN_INLINE void put(std::int64_t i, int some, W<E> v) const {
    if (some) return write_some(to + i, some, v);
    if (past) return stream(to + i, v);
    write(to + i, v);
  }
};

// f(place, lanes that count or 0 for all): one copy of the loop's body serves the rest as well.
template <typename E, typename F>
FLATKERN_INLINE void each_piece(std::int64_t count, const F& f) {
  constexpr int width = lanes<E>;
  for (std::int64_t i = 0; i < count; i += width) f(i, count - i >= width ? 0 : static_cast<int>(count - i));
}

// use(place, lanes, value and derivatives) for the pieces of a chunk.
template <Activation kind, typename E, typename F>
void evaluate_as(const ActivationSpec& spec, const E* z, std::int64_t count, const F& use) {
  each_piece<E>(count, [&](std::int64_t i, int some) __attribute__((always_inline)) {
    use(i, some, three<kind>(take(z, i, some), spec));
  });
}

template <typename E, typename F>
void evaluate(const ActivationSpec& spec, const E* z, std::int64_t count, const F& use) {
  switch (spec.kind) {
    case Activation::relu:
      return evaluate_as<Activation::relu>(spec, z, count, use);
    case Activation::gelu:
      return evaluate_as<Activation::gelu>(spec, z, count, use);
    case Activation::gelu_tanh:
      return evaluate_as<Activation::gelu_tanh>(spec, z, count, use);
    case Activation::silu:
      return evaluate_as<Activation::silu>(spec, z, count, use);
    case Activation::tanh:
      return evaluate_as<Activation::tanh>(spec, z, count, use);
    case Activation::sigmoid:
      return evaluate_as<Activation::sigmoid>(spec, z, count, use);
    case Activation::softplus:
      return evaluate_as<Activation::softplus>(spec, z, count, use);
    case Activation::elu:
      return evaluate_as<Activation::elu>(spec, z, count, use);
    case Activation::count:
      return;
  }
}

inline std::int64_t chunk_size(std::int64_t n, std::int64_t at) {
  return n - at < kJetChunk ? n - at : kJetChunk;
}

template <typename E>
void activation_derivatives(const ActivationSpec& spec, const ActivationDerivativesArgs<E>& a, std::int64_t n,
                            std::int64_t begin, std::int64_t end) {
  typedef wide_t<E> T;
  const bool past = static_cast<std::int64_t>(sizeof(E)) * 3 * n >= kPastCaches;
  for (std::int64_t at = begin * kJetChunk; at < end * kJetChunk; at += kJetChunk) {
    const Out<E> value(a.value + at, past), slope(a.slope + at, past), bend(a.bend + at, past);
    evaluate(spec, a.z + at, chunk_size(n, at),
             [&](std::int64_t i, int some, const Three<V<T>>& f) __attribute__((always_inline)) {
               value.put(i, some, f.value);
               slope.put(i, some, f.slope);
               bend.put(i, some, f.bend);
             });
  }
  if (past) stream_end();
}

template <typename E>
void activation_jet(const ActivationSpec& spec, const ActivationJetArgs<E>& a, std::int64_t n,
                    std::int64_t begin, std::int64_t end) {
  typedef wide_t<E> T;
  Kept<T> kept;
  const std::int64_t outputs = 1 + a.k * (a.second ? 2 : 1);
  const bool past = static_cast<std::int64_t>(sizeof(E)) * outputs * n >= kPastCaches;
  for (std::int64_t at = begin * kJetChunk; at < end * kJetChunk; at += kJetChunk) {
    const std::int64_t count = chunk_size(n, at);
    const E *t = a.t + at, *s = a.s ? a.s + at : nullptr;
    const Out<E> value(a.value + at, past), first(a.first + at, past), second(a.second + at, past);
    const bool one = a.k > 0, more = a.k > 1, twice = a.second != nullptr;
    evaluate(spec, a.z + at, count,
             [&](std::int64_t i, int some, const Three<V<T>>& f) __attribute__((always_inline)) {
               value.put(i, some, f.value);
               if (more) {
                 store<T>(kept.slope + i, f.slope);
                 store<T>(kept.bend + i, f.bend);
               }
               if (!one) return;
               const V<T> x = take(t, i, some);
               first.put(i, some, f.slope * x);
               if (!twice) return;
               const V<T> y = f.bend * x * x;
               second.put(i, some, s ? y + f.slope * take(s, i, some) : y);
             });
    for (std::int64_t j = 1; j < a.k; ++j) {
      const std::int64_t from = j * n + at;
      const E *tj = a.t + from, *sj = a.s ? a.s + from : nullptr;
      const Out<E> first_j(a.first + from, past), second_j(twice ? a.second + from : a.first, past);
      each_piece<E>(count, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        const V<T> x = take(tj, i, some), slope = load<T>(kept.slope + i);
        first_j.put(i, some, slope * x);
        if (!twice) return;
        const V<T> y = load<T>(kept.bend + i) * x * x;
        second_j.put(i, some, sj ? y + slope * take(sj, i, some) : y);
      });
    }
  }
  if (past) stream_end();
}

template <typename E>
void activation_pullback(const ActivationSpec& spec, const ActivationPullbackArgs<E>& a, std::int64_t n,
                         std::int64_t begin, std::int64_t end) {
  typedef wide_t<E> T;
  Kept<T> kept;
  const bool past = static_cast<std::int64_t>(sizeof(E)) * (1 + a.k) * n >= kPastCaches;
  for (std::int64_t at = begin * kJetChunk; at < end * kJetChunk; at += kJetChunk) {
    const std::int64_t count = chunk_size(n, at);
    const E *g = a.g + at, *t = a.t + at, *dg = a.dg + at;
    const Out<E> cotangent(a.cotangent + at, past), tangents(a.tangents + at, past);
    const bool one = a.k > 0, more = a.k > 1;
    evaluate(spec, a.z + at, count,
             [&](std::int64_t i, int some, const Three<V<T>>& f) __attribute__((always_inline)) {
               const V<T> above = take(g, i, some), bend = f.bend * above;
               cotangent.put(i, some, f.slope * above);
               if (more) {
                 store<T>(kept.slope + i, f.slope);
                 store<T>(kept.bend + i, bend);
               }
               if (one) tangents.put(i, some, f.slope * take(dg, i, some) + bend * take(t, i, some));
             });
    for (std::int64_t j = 1; j < a.k; ++j) {
      const E *tj = a.t + j * n + at, *dgj = a.dg + j * n + at;
      const Out<E> out(a.tangents + j * n + at, past);
      each_piece<E>(count, [&](std::int64_t i, int some) __attribute__((always_inline)) {
        out.put(i, some,
                load<T>(kept.slope + i) * take(dgj, i, some) + load<T>(kept.bend + i) * take(tj, i, some));
      });
    }
  }
  if (past) stream_end();
}

}  // namespace flatkern::cpu::FLATKERN_ISA
