// Value, first and second derivative of the activations, for single numbers and vectors alike.
#pragma once

#include "real_math.h"

namespace flatkern {

// In the order of flatkern/kernels/_activation_forms.py.
enum class Activation : int { relu, gelu, gelu_tanh, silu, tanh, sigmoid, softplus, elu, count };

// a: alpha of elu, beta of softplus; b: threshold of softplus.
struct ActivationSpec {
  Activation kind;
  double a, b;
};

template <typename N>
struct Three {
  N value, slope, bend;
};

template <typename N>
FLATKERN_HD Three<N> relu_three(N z) {
  return {z < N{} ? N{} : z, z > N{} ? constant<N>(1) : N{}, N{}};
}

template <typename N>
struct Logistic {
  N value, first, second;  // of the logistic function
  N exp;                   // e^-|x|
};

template <typename N>
FLATKERN_HD Logistic<N> logistic(N x) {
  typedef typename Real<N>::Element T;
  const Exponential<N> e = exponential(-absolute(x));
  const N per = T(1) / (e.expm1 + T(2));
  const N below = e.exp * per;  // the logistic function of -|x|
  const N first = below * per;
  // tanh(x / 2), exact near 0
  const N half = with_sign(-e.expm1 * per, x);
  return {x < N{} ? below : per, first, -first * half, e.exp};
}

template <typename N>
FLATKERN_HD Three<N> sigmoid_three(N z) {
  const Logistic<N> s = logistic(z);
  return {s.value, s.first, s.second};
}

template <typename N>
FLATKERN_HD Three<N> tanh_three(N z) {
  typedef typename Real<N>::Element T;
  const Exponential<N> e = exponential(absolute(z) * T(-2));
  const N per = T(1) / (e.expm1 + T(2));
  const N value = with_sign(-e.expm1 * per, z);
  const N slope = e.exp * T(4) * per * per;
  return {value, slope, value * slope * T(-2)};
}

template <typename N>
FLATKERN_HD Three<N> silu_three(N z) {
  typedef typename Real<N>::Element T;
  const Logistic<N> s = logistic(z);
  return {z * s.value, s.value + z * s.first, s.first * T(2) + z * s.second};
}

// z Phi(z). In double the square of z is taken as (high part)^2, which is exact, and a rest: its rounding
// would be magnified by the exponential. In float that costs a tenth of the time; the tail is good to z^2
// roundings.
template <typename N>
FLATKERN_HD Three<N> gelu_three(N z) {
  using R = Real<N>;
  typedef typename R::Element T;
  typedef typename R::Bits B;
  constexpr T furthest = R::wide ? T(39) : T(14);
  const N size = absolute(z);
  const N u = size > furthest ? constant<N>(furthest) : size;
  N e;
  if constexpr (R::wide) {
    const N high = bits_as<N>(bits_as<B>(u) & ~typename R::Word(0x7ffffff));
    const N rest = (u - high) * (u + high);
    e = exponential(high * high * T(-0.5), rest * T(-0.5)).exp;
  } else {
    e = exponential(u * u * T(-0.5)).exp;
  }
  N per;
  const N tail = normal_tail(u, &per) * per * e;
  const N below = z < N{} ? tail : T(1) - tail;
  const N density = e * T(0.3989422804014327);
  return {z * below, below + with_sign(u, z) * density, (T(2) - u * u) * density};
}

// z s(w), s the logistic function and w = rate (z + cubic z^3); beyond 25 s is 0 or 1.
template <typename N>
FLATKERN_HD Three<N> gelu_tanh_three(N z) {
  typedef typename Real<N>::Element T;
  constexpr T rate = T(1.5957691216057308), cubic = T(0.044715), furthest = T(25);
  const N size = absolute(z);
  const N x = with_sign(size > furthest ? constant<N>(furthest) : size, z);
  const N square = x * x * cubic;
  const Logistic<N> s = logistic(x * (square + T(1)) * rate);
  const N w1 = (square * T(3) + T(1)) * rate;
  const N first = s.first * w1;
  const N second = s.second * w1 * w1 + s.first * x * (T(6) * rate * cubic);
  return {z * s.value, s.value + x * first, first * T(2) + x * second};
}

template <typename N>
FLATKERN_HD Three<N> softplus_three(N z, const ActivationSpec& spec) {
  typedef typename Real<N>::Element T;
  const T beta = static_cast<T>(spec.a), per_beta = static_cast<T>(1 / spec.a),
          threshold = static_cast<T>(spec.b);
  const N x = z * beta;
  const Logistic<N> s = logistic(x);
  const N value = ((x < N{} ? N{} : x) + log_one_plus(s.exp)) * per_beta;
  return {x > threshold ? z : value, x > threshold ? constant<N>(1) : s.value,
          x > threshold ? N{} : s.first * beta};
}

template <typename N>
FLATKERN_HD Three<N> elu_three(N z, const ActivationSpec& spec) {
  typedef typename Real<N>::Element T;
  const T alpha = static_cast<T>(spec.a);
  const Exponential<N> e = exponential(z > N{} ? N{} : z);
  const N growth = e.exp * alpha;
  return {z > N{} ? z : e.expm1 * alpha, z > N{} ? constant<N>(1) : growth, z < N{} ? growth : N{}};
}

template <Activation kind, typename N>
FLATKERN_HD Three<N> three(N z, const ActivationSpec& spec) {
  if constexpr (kind == Activation::relu) return relu_three(z);
  if constexpr (kind == Activation::gelu) return gelu_three(z);
  if constexpr (kind == Activation::gelu_tanh) return gelu_tanh_three(z);
  if constexpr (kind == Activation::silu) return silu_three(z);
  if constexpr (kind == Activation::tanh) return tanh_three(z);
  if constexpr (kind == Activation::sigmoid) return sigmoid_three(z);
  if constexpr (kind == Activation::softplus) return softplus_three(z, spec);
  if constexpr (kind == Activation::elu) return elu_three(z, spec);
}

// The same, of the kind that the specification names.
template <typename N>
FLATKERN_HD Three<N> three(N z, const ActivationSpec& spec) {
  switch (spec.kind) {
    case Activation::relu:
      return three<Activation::relu>(z, spec);
    case Activation::gelu:
      return three<Activation::gelu>(z, spec);
    case Activation::gelu_tanh:
      return three<Activation::gelu_tanh>(z, spec);
    case Activation::silu:
      return three<Activation::silu>(z, spec);
    case Activation::tanh:
      return three<Activation::tanh>(z, spec);
    case Activation::sigmoid:
      return three<Activation::sigmoid>(z, spec);
    case Activation::softplus:
      return three<Activation::softplus>(z, spec);
    default:
      return three<Activation::elu>(z, spec);
  }
}

}  // namespace flatkern
