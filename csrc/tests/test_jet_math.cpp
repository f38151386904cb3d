// Tests of the activations that the CPU and the GPU share (csrc/common/activation_math.h), as single numbers
// and as vectors, against formulas in long double: 0 on success.
#include <cmath>
#include <cstdio>
#include <limits>

#include "common/activation_math.h"
#include "common/bf16.h"

namespace {

using flatkern::Activation;
using flatkern::ActivationSpec;
using flatkern::Three;

int failures = 0;

void expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::printf("FAILED line %d: %s\n", line, what);
  ++failures;
}

#define EXPECT(condition) expect((condition), #condition, __LINE__)

typedef long double L;

Three<L> logistic(L x) {
  const L e = std::exp(-std::fabs(x)), d = 1 / (1 + e);
  return {x < 0 ? e * d : d, e * d * d, -e * d * d * std::tanh(x / 2)};
}

Three<L> exact(const ActivationSpec& spec, L z) {
  const L pi = 3.14159265358979323846264338327950288L;
  switch (spec.kind) {
    case Activation::relu:
      return {z > 0 ? z : 0, z > 0 ? 1.0L : 0, 0};
    case Activation::gelu: {
      const L below = std::erfc(-z / std::sqrt(2.0L)) / 2, density = std::exp(-z * z / 2) / std::sqrt(2 * pi);
      return {z * below, below + z * density, (2 - z * z) * density};
    }
    case Activation::gelu_tanh: {
      const L rate = 2 * std::sqrt(2 / pi), cubic = 0.044715L;
      const Three<L> s = logistic(rate * z * (1 + cubic * z * z));
      const L w1 = rate * (1 + 3 * cubic * z * z), w2 = 6 * rate * cubic * z;
      const L first = s.slope * w1, second = s.bend * w1 * w1 + s.slope * w2;
      return {z * s.value, s.value + z * first, 2 * first + z * second};
    }
    case Activation::silu: {
      const Three<L> s = logistic(z);
      return {z * s.value, s.value + z * s.slope, 2 * s.slope + z * s.bend};
    }
    case Activation::tanh: {
      const L y = std::tanh(z), slope = 1 / (std::cosh(z) * std::cosh(z));
      return {y, slope, -2 * y * slope};
    }
    case Activation::sigmoid:
      return logistic(z);
    case Activation::softplus: {
      const L x = spec.a * z;
      if (x > spec.b) return {z, 1, 0};
      const Three<L> s = logistic(x);
      return {((x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x)))) / spec.a, s.value, spec.a * s.slope};
    }
    default:
      if (z > 0) return {z, 1, 0};
      return {spec.a * std::expm1(z), spec.a * std::exp(z), z < 0 ? spec.a * std::exp(z) : 0};
  }
}

template <typename N>
Three<N> any(const ActivationSpec& spec, N z) {
  switch (spec.kind) {
    case Activation::relu:
      return flatkern::three<Activation::relu>(z, spec);
    case Activation::gelu:
      return flatkern::three<Activation::gelu>(z, spec);
    case Activation::gelu_tanh:
      return flatkern::three<Activation::gelu_tanh>(z, spec);
    case Activation::silu:
      return flatkern::three<Activation::silu>(z, spec);
    case Activation::tanh:
      return flatkern::three<Activation::tanh>(z, spec);
    case Activation::sigmoid:
      return flatkern::three<Activation::sigmoid>(z, spec);
    case Activation::softplus:
      return flatkern::three<Activation::softplus>(z, spec);
    default:
      return flatkern::three<Activation::elu>(z, spec);
  }
}

typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));

template <typename T, typename V>
void activations() {
  const T eps = std::numeric_limits<T>::epsilon();
  for (int kind = 0; kind < static_cast<int>(Activation::count); ++kind) {
    ActivationSpec spec = {static_cast<Activation>(kind), 1, 0};
    if (spec.kind == Activation::softplus) spec.a = 1.5, spec.b = 20;
    if (spec.kind == Activation::elu) spec.a = 0.7;
    L worst = 0;
    for (int i = -4000; i <= 4000; ++i) {
      // from 1e-6 to 30, more densely near 0
      const T z = static_cast<T>((i < 0 ? -1 : 1) * (std::exp(std::abs(i) * 0.0043) - 1) * 1e-6);
      const Three<L> right = exact(spec, z);
      const Three<T> got = any(spec, z);
      const Three<V> lanes = any(spec, V{} + z);
      const L size = std::fabs(z),
              slack = spec.kind == Activation::gelu_tanh ? 1 + size * size * size : 1 + size * size;
      const L scale = std::fabs(right.slope) + std::fabs(right.bend) + static_cast<L>(1e-30);
      const L errors[] = {
          std::fabs(got.value - right.value) / (std::fabs(right.value) + static_cast<L>(1e-30)),
          std::fabs(got.slope - right.slope) / scale, std::fabs(got.bend - right.bend) / scale};
      for (const L e : errors) worst = e / slack > worst ? e / slack : worst;
      for (unsigned l = 0; l < sizeof(V) / sizeof(T); ++l) {
        EXPECT(std::fabs(lanes.value[l] - got.value) <= 2 * eps * std::fabs(got.value));
        EXPECT(std::fabs(lanes.slope[l] - got.slope) <= 4 * eps * static_cast<T>(scale));
        EXPECT(std::fabs(lanes.bend[l] - got.bend) <= 8 * eps * static_cast<T>(scale));
      }
    }
    if (worst > 8 * eps) std::printf("kind %d: %.2Lf eps\n", kind, worst / eps);
    EXPECT(worst <= 8 * eps);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    EXPECT(std::isnan(any(spec, nan).value));
    for (const T far : {T(1e30), T(-1e30), T(300), T(-300)}) {
      const Three<T> f = any(spec, far);
      EXPECT(std::isfinite(f.value) && std::isfinite(f.slope) && std::isfinite(f.bend));
    }
  }
}

template <typename T>
void exponentials() {
  const T eps = std::numeric_limits<T>::epsilon();
  for (int i = 0; i <= 8000; ++i) {
    const T x = static_cast<T>(-i * (sizeof(T) == 8 ? 0.088 : 0.0108));
    const flatkern::Exponential<T> e = flatkern::exponential(x);
    EXPECT(std::fabs(e.exp - std::exp(static_cast<L>(x))) <= 1.5 * eps * std::exp(static_cast<L>(x)));
    EXPECT(std::fabs(e.expm1 - std::expm1(static_cast<L>(x))) <=
           1.5 * eps * std::fabs(std::expm1(static_cast<L>(x))));
  }
  for (int i = 0; i <= 1000; ++i) {
    const T e = static_cast<T>(std::pow(10.0, -0.03 * i));
    EXPECT(std::fabs(flatkern::log_one_plus(e) - std::log1p(static_cast<L>(e))) <=
           2 * eps * std::log1p(static_cast<L>(e)));
  }
  EXPECT(flatkern::weight_of(-std::numeric_limits<T>::infinity()) == 0 && flatkern::weight_of(T(0)) == 1);
}

void bfloat16() {
  for (const float x : {1.0f, -2.5f, 3.14159f, 1e-30f, 65504.0f, 1.00390625f, 1.01171875f}) {
    flatkern::Bf16 b;
    flatkern::narrow(x, &b);
    EXPECT(std::fabs(flatkern::widen(b) - x) <= std::fabs(x) / 256);
  }
  flatkern::Bf16 b;
  flatkern::narrow(1.00390625f, &b);  // half way: to even
  EXPECT(flatkern::widen(b) == 1.0f);
  flatkern::narrow(1.01171875f, &b);
  EXPECT(flatkern::widen(b) == 1.015625f);
  flatkern::narrow(std::numeric_limits<float>::quiet_NaN(), &b);
  EXPECT(std::isnan(flatkern::widen(b)));
  flatkern::narrow(std::numeric_limits<float>::infinity(), &b);
  EXPECT(std::isinf(flatkern::widen(b)));
}

}  // namespace

int main() {
  activations<float, Floats>();
  activations<double, Doubles>();
  exponentials<float>();
  exponentials<double>();
  bfloat16();
  if (failures == 0) std::printf("activations: all tests passed\n");
  return failures == 0 ? 0 : 1;
}
