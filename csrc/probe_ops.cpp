// The torch door of random rows and of the step of Lanczos; see ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/probe_rows.h"
#include "dispatch.h"
#include "gpu_call.h"
#ifdef FLATKERN_CUDA
#include "cuda/kernels.h"
#endif

namespace {

using flatkern::dispatch;
using flatkern::empty;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_contiguous_dots(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "flatkern: expected contiguous rows [batch, k, size]");
}

// Unit strides inside rows, one shape and dtype, and beta as doubles.
void check_step(const Tensor& image, const Tensor& current, const Tensor& previous, const Tensor& beta,
                const Tensor& residual) {
  for (const Tensor& t : {image, current, previous, residual}) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == image.size(0) && t.size(1) == image.size(1) &&
                        t.scalar_type() == image.scalar_type() && (t.stride(1) == 1 || t.size(1) <= 1),
                    "flatkern: expected rows [k, size] of one dtype with unit strides");
  }
  STD_TORCH_CHECK(beta.dim() == 1 && beta.size(0) == image.size(0) && beta.is_contiguous() &&
                      beta.scalar_type() == ScalarType::Double,
                  "flatkern: expected beta [k] in float64");
}

namespace cpu {

using flatkern::cpu::kernels;

void over_threads(std::int64_t n, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& f) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, f);
}

// `member` picks the generator from the table of a type.
template <typename Member>
Tensor random_rows(const Tensor& like, std::int64_t seed, std::int64_t first, std::int64_t rows,
                   std::int64_t size, const Member& member) {
  Tensor out = empty(like, {rows, size}, like.scalar_type());
  dispatch(like, [&](auto zero) {
    flatkern::cpu::random_rows(member(kernels().probes->of(zero)), seed, first, rows, size,
                               static_cast<decltype(zero)*>(out.mutable_data_ptr()), over_threads);
  });
  return out;
}

Tensor rademacher(Tensor like, std::int64_t seed, std::int64_t first, std::int64_t rows, std::int64_t size) {
  return random_rows(like, seed, first, rows, size, [](const auto& table) { return table.rademacher; });
}

Tensor normal(Tensor like, std::int64_t seed, std::int64_t first, std::int64_t rows, std::int64_t size) {
  return random_rows(like, seed, first, rows, size, [](const auto& table) { return table.normal; });
}

Tensor rademacher_dot(Tensor x, std::int64_t seed, std::int64_t first) {
  check_contiguous_dots(x);
  Tensor out = empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    flatkern::cpu::rademacher_dots<T>(seed, first, x.size(0), x.size(1), x.size(2),
                                      static_cast<const T*>(x.const_data_ptr()),
                                      static_cast<double*>(out.mutable_data_ptr()), over_threads);
  });
  return out;
}

std::tuple<Tensor, Tensor> lanczos_step(Tensor image, Tensor current, Tensor previous, Tensor beta,
                                        Tensor residual) {
  check_step(image, current, previous, beta, residual);
  Tensor alpha = empty(image, {image.size(0)}, ScalarType::Double);
  Tensor norm = empty(image, {image.size(0)}, ScalarType::Double);
  dispatch(image, [&](auto zero) {
    using T = decltype(zero);
    const auto rows = [](const Tensor& t) {
      return flatkern::cpu::Rows<const T>{static_cast<const T*>(t.const_data_ptr()), t.stride(0)};
    };
    flatkern::cpu::lanczos_step<T>(image.size(0), image.size(1), rows(image), rows(current), rows(previous),
                                   static_cast<const double*>(beta.const_data_ptr()),
                                   {static_cast<T*>(residual.mutable_data_ptr()), residual.stride(0)},
                                   static_cast<double*>(alpha.mutable_data_ptr()),
                                   static_cast<double*>(norm.mutable_data_ptr()), over_threads);
  });
  return {alpha, norm};
}

}  // namespace cpu

#ifdef FLATKERN_CUDA
namespace cuda {

using flatkern::GpuCall;

// `generate` launches for the rows of a type.
template <typename Generate>
Tensor random_rows(const Tensor& like, std::int64_t rows, std::int64_t size, const Generate& generate) {
  const GpuCall call(like);
  Tensor out = empty(like, {rows, size}, like.scalar_type());
  dispatch(like, [&](auto zero) {
    call.check(generate(static_cast<decltype(zero)*>(out.mutable_data_ptr()), call.stream()));
  });
  return out;
}

Tensor rademacher(Tensor like, std::int64_t seed, std::int64_t first, std::int64_t rows, std::int64_t size) {
  return random_rows(like, rows, size, [&](auto* out, void* stream) {
    return flatkern::cuda::rademacher(seed, first, rows, size, out, stream);
  });
}

Tensor normal(Tensor like, std::int64_t seed, std::int64_t first, std::int64_t rows, std::int64_t size) {
  return random_rows(like, rows, size, [&](auto* out, void* stream) {
    return flatkern::cuda::normal(seed, first, rows, size, out, stream);
  });
}

Tensor rademacher_dot(Tensor x, std::int64_t seed, std::int64_t first) {
  check_contiguous_dots(x);
  const GpuCall call(x);
  const std::int64_t lines = x.size(0) * x.size(1);
  Tensor out = empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  Tensor partial = empty(x, {lines, flatkern::cuda::probe_blocks(x.size(2))}, ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::rademacher_dots<T>(
        seed, first, x.size(0), x.size(1), x.size(2), static_cast<const T*>(x.const_data_ptr()),
        static_cast<double*>(partial.mutable_data_ptr()), static_cast<double*>(out.mutable_data_ptr()),
        call.stream()));
  });
  return out;
}

std::tuple<Tensor, Tensor> lanczos_step(Tensor image, Tensor current, Tensor previous, Tensor beta,
                                        Tensor residual) {
  check_step(image, current, previous, beta, residual);
  const GpuCall call(image);
  const std::int64_t k = image.size(0), size = image.size(1);
  Tensor alpha = empty(image, {k}, ScalarType::Double), norm = empty(image, {k}, ScalarType::Double);
  Tensor partial = empty(image, {k, flatkern::cuda::lanczos_blocks(size)}, ScalarType::Double);
  dispatch(image, [&](auto zero) {
    using T = decltype(zero);
    const auto rows = [](const Tensor& t) {
      return flatkern::cuda::Strided<const T>{static_cast<const T*>(t.const_data_ptr()), t.stride(0)};
    };
    call.check(flatkern::cuda::lanczos_step<T>(
        k, size, rows(image), rows(current), rows(previous),
        static_cast<const double*>(beta.const_data_ptr()),
        {static_cast<T*>(residual.mutable_data_ptr()), residual.stride(0)},
        static_cast<double*>(partial.mutable_data_ptr()), static_cast<double*>(alpha.mutable_data_ptr()),
        static_cast<double*>(norm.mutable_data_ptr()), call.stream()));
  });
  return {alpha, norm};
}

}  // namespace cuda
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flatkern, m) {
  m.def("rademacher(Tensor like, int seed, int first, int rows, int size) -> Tensor");
  m.def("normal(Tensor like, int seed, int first, int rows, int size) -> Tensor");
  m.def("rademacher_dot(Tensor x, int seed, int first) -> Tensor");
  m.def(
      "lanczos_step(Tensor image, Tensor current, Tensor previous, Tensor beta, Tensor(a!) residual) -> "
      "(Tensor, Tensor)");
}

#ifndef FLATKERN_EMULATED_CUDA
STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  m.impl("rademacher", TORCH_BOX(&cpu::rademacher));
  m.impl("normal", TORCH_BOX(&cpu::normal));
  m.impl("rademacher_dot", TORCH_BOX(&cpu::rademacher_dot));
  m.impl("lanczos_step", TORCH_BOX(&cpu::lanczos_step));
}
#endif

#ifdef FLATKERN_CUDA
FLATKERN_GPU_IMPL(m) {
  m.impl("rademacher", TORCH_BOX(&cuda::rademacher));
  m.impl("normal", TORCH_BOX(&cuda::normal));
  m.impl("rademacher_dot", TORCH_BOX(&cuda::rademacher_dot));
  m.impl("lanczos_step", TORCH_BOX(&cuda::lanczos_step));
}
#endif
