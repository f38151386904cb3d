// The torch door: schemas and the code between tensors and raw pointers, on the stable ABI alone, so that one
// binary serves every torch from 2.11 on. Autograd, shapes for tracing and vmap are added in Python
// (flatkern/kernels), which also checks the arguments; nothing else calls these operators.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/probe_rows.h"
#include "dispatch.h"
#ifdef FLATKERN_CUDA
#include "cuda/kernels.h"
// On a torch without CUDA this symbol is absent; weak, it lets the very same library load there.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace {

using flatkern::dispatch;
using flatkern::Matrices;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
Matrices<T> matrices(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const std::size_t dims = sizes.size();
  STD_TORCH_CHECK(dims >= 2, "flatkern: expected a batch of matrices");
  Matrices<T> m;
  m.data = static_cast<const T*>(x.const_data_ptr());
  m.rows = sizes[dims - 2], m.cols = sizes[dims - 1];
  m.row_stride = strides[dims - 2], m.col_stride = strides[dims - 1];
  for (std::size_t k = 0; k + 2 < dims; ++k) {
    STD_TORCH_CHECK(m.batch.push(sizes[k], strides[k]), "flatkern: more than ", flatkern::kMaxBatchDims,
                    " separate batch dimensions");
  }
  return m;
}

std::vector<std::int64_t> batch_sizes(const Tensor& x, std::initializer_list<std::int64_t> rest = {}) {
  const auto sizes = x.sizes();
  std::vector<std::int64_t> out(sizes.begin(), sizes.end() - 2);
  out.insert(out.end(), rest);
  return out;
}

Tensor empty(const Tensor& like, const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

void check_sizes(const Tensor& x, std::int64_t limit, bool square) {
  const std::int64_t rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1);
  STD_TORCH_CHECK(rows <= limit, "flatkern: the compiled kernel takes matrices of up to ", limit, " rows");
  STD_TORCH_CHECK(!square || rows == cols, "flatkern: the matrices must be square");
}

struct StatsTensors {
  Tensor logdet, trace, frobenius_sq, rank_deficient, pivot_ratio, bad_pivots;

  explicit StatsTensors(const Tensor& x)
      : logdet(empty(x, batch_sizes(x), ScalarType::Double)),
        trace(empty(x, batch_sizes(x), ScalarType::Double)),
        frobenius_sq(empty(x, batch_sizes(x), ScalarType::Double)),
        rank_deficient(empty(x, batch_sizes(x), ScalarType::Bool)),
        pivot_ratio(empty(x, batch_sizes(x), ScalarType::Double)),
        bad_pivots(empty(x, batch_sizes(x), ScalarType::Long)) {}

  flatkern::GramStatsOut pointers() const {
    const auto real = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
    return {real(logdet),
            real(trace),
            real(frobenius_sq),
            static_cast<bool*>(rank_deficient.mutable_data_ptr()),
            real(pivot_ratio),
            static_cast<std::int64_t*>(bad_pivots.mutable_data_ptr()),
            nullptr,
            nullptr};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {logdet, trace, frobenius_sq, rank_deficient, pivot_ratio, bad_pivots};
  }
};

namespace cpu {

using flatkern::cpu::kernels;

Tensor spd_logdet(Tensor g) {
  check_sizes(g, flatkern::cpu::kMaxSize, true);
  Tensor out = empty(g, batch_sizes(g), g.scalar_type());
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(g);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(
        0, m.batch.count(), flatkern::cpu::grain_spd(m.rows),
        [&](std::int64_t begin, std::int64_t end) { kernels().of(zero).spd_logdet(m, begin, end, to); });
  });
  return out;
}

// `weight`: contiguous, of g's dtype, one a sample.
Tensor spd_pullback(Tensor g, Tensor weight) {
  check_sizes(g, flatkern::cpu::kMaxSize, true);
  const std::int64_t c = g.size(-1);
  Tensor out = empty(g, batch_sizes(g, {c, c}), g.scalar_type());
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(g);
    const T* weights = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, m.batch.count(), flatkern::cpu::grain_spd(2 * m.rows),
                                [&](std::int64_t begin, std::int64_t end) {
                                  kernels().of(zero).spd_pullback(m, weights, begin, end, to);
                                });
  });
  return out;
}

Tensor gram(Tensor x) {
  check_sizes(x, flatkern::cpu::kMaxSize, false);
  const std::int64_t c = x.size(x.dim() - 2);
  Tensor out = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(x);
    double* to = static_cast<double*>(out.mutable_data_ptr());
    torch::stable::parallel_for(
        0, m.batch.count(), flatkern::cpu::grain_gram(m.rows, m.cols),
        [&](std::int64_t begin, std::int64_t end) { kernels().of(zero).gram(m, begin, end, to); });
  });
  return out;
}

template <typename F>
void over_samples(const Tensor& x, std::int64_t grain, F&& f) {
  dispatch(x, [&](auto zero) {
    const auto m = matrices<decltype(zero)>(x);
    torch::stable::parallel_for(0, m.batch.count(), grain, [&](std::int64_t begin, std::int64_t end) {
      f(kernels().of(zero), m, begin, end);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_stats(Tensor x) {
  check_sizes(x, flatkern::cpu::kMaxSize, false);
  const StatsTensors out(x);
  over_samples(x, flatkern::cpu::grain_gram(x.size(-2), x.size(-1)),
               [to = out.pointers()](const auto& table, const auto& m, std::int64_t begin, std::int64_t end) {
                 table.gram_stats(m, begin, end, to);
               });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_stats_factors(Tensor x) {
  check_sizes(x, flatkern::cpu::kMaxSize, false);
  const StatsTensors out(x);
  const std::int64_t c = x.size(-2);
  Tensor gram = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  Tensor inverse = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  flatkern::GramStatsOut to = out.pointers();
  to.gram = static_cast<double*>(gram.mutable_data_ptr());
  to.inverse = static_cast<double*>(inverse.mutable_data_ptr());
  over_samples(x, flatkern::cpu::grain_gram(2 * c, x.size(-1)),
               [to](const auto& table, const auto& m, std::int64_t begin, std::int64_t end) {
                 table.gram_stats(m, begin, end, to);
               });
  return std::tuple_cat(out.tuple(), std::make_tuple(gram, inverse));
}

// All but x are contiguous and float64.
Tensor gram_pullback(Tensor x, Tensor gram, Tensor inverse, Tensor logdet, Tensor trace,
                     Tensor frobenius_sq) {
  check_sizes(x, flatkern::cpu::kMaxSize, false);
  Tensor out = empty(x, batch_sizes(x, {x.size(-2), x.size(-1)}), x.scalar_type());
  const auto read = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  const flatkern::GramCotangents g{read(logdet), read(trace), read(frobenius_sq), read(gram), read(inverse)};
  void* to = out.mutable_data_ptr();
  over_samples(x, flatkern::cpu::grain_gram(2 * x.size(-2), x.size(-1)),
               [&](const auto& table, const auto& m, std::int64_t begin, std::int64_t end) {
                 using T = std::remove_const_t<std::remove_pointer_t<decltype(m.data)>>;
                 table.gram_pullback(m, g, begin, end, static_cast<T*>(to));
               });
  return out;
}

void fill_spectrum(const Tensor& x, double floor, double* values, double* vectors) {
  check_sizes(x, flatkern::cpu::kMaxSpectrum, false);
  over_samples(x, flatkern::cpu::grain_spectrum(x.size(-2), x.size(-1)),
               [&](const auto& table, const auto& m, std::int64_t begin, std::int64_t end) {
                 table.gram_spectrum(m, floor, begin, end, values, vectors);
               });
}

Tensor gram_singular_values(Tensor x, bool precise) {
  Tensor values = empty(x, batch_sizes(x, {x.size(-2)}), ScalarType::Double);
  fill_spectrum(x, precise ? flatkern::cpu::kGramFloor : 0, static_cast<double*>(values.mutable_data_ptr()),
                nullptr);
  return values;
}

std::tuple<Tensor, Tensor> gram_singular_vectors(Tensor x) {
  const std::int64_t c = x.size(-2);
  Tensor values = empty(x, batch_sizes(x, {c}), ScalarType::Double);
  Tensor vectors = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  fill_spectrum(x, flatkern::cpu::kGramFloor, static_cast<double*>(values.mutable_data_ptr()),
                static_cast<double*>(vectors.mutable_data_ptr()));
  return {values, vectors};
}

// `wanted`: contiguous bool, one a sample.
Tensor lq_factor(Tensor x, Tensor wanted) {
  const std::int64_t c = x.size(-2);
  Tensor out = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  const bool* mask = static_cast<const bool*>(wanted.const_data_ptr());
  double* to = static_cast<double*>(out.mutable_data_ptr());
  over_samples(x, 1, [&](const auto& table, const auto& m, std::int64_t begin, std::int64_t end) {
    table.lq(m, mask, begin, end, to);
  });
  return out;
}

// -- random rows and the step of Lanczos ----------------------------------------------------------------
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

void check_contiguous_dots(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "flatkern: expected contiguous rows [batch, k, size]");
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

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check(int error) {
  STD_TORCH_CHECK(error == 0, "flatkern: CUDA kernel launch failed: ", flatkern::cuda::error_string(error));
}

Tensor spd_logdet(Tensor g) {
  check_sizes(g, flatkern::cuda::kMaxSize, true);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  Tensor out = empty(g, batch_sizes(g), g.scalar_type());
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::spd_logdet<T>(matrices<T>(g), static_cast<T*>(out.mutable_data_ptr()),
                                        current_stream(g)));
  });
  return out;
}

Tensor gram(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::int64_t c = x.size(x.dim() - 2);
  Tensor out = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::gram<T>(matrices<T>(x), static_cast<double*>(out.mutable_data_ptr()),
                                  current_stream(x)));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_stats(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const StatsTensors out(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::gram_stats<T>(matrices<T>(x), out.pointers(), current_stream(x)));
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_stats_factors(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const StatsTensors out(x);
  const std::int64_t c = x.size(-2);
  Tensor gram = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  Tensor inverse = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  flatkern::GramStatsOut to = out.pointers();
  to.gram = static_cast<double*>(gram.mutable_data_ptr());
  to.inverse = static_cast<double*>(inverse.mutable_data_ptr());
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::gram_stats<T>(matrices<T>(x), to, current_stream(x)));
  });
  return std::tuple_cat(out.tuple(), std::make_tuple(gram, inverse));
}

// `weight`: contiguous, of g's dtype, one a sample.
Tensor spd_pullback(Tensor g, Tensor weight) {
  check_sizes(g, flatkern::cuda::kMaxSize, true);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const std::int64_t c = g.size(-1);
  Tensor out = empty(g, batch_sizes(g, {c, c}), g.scalar_type());
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::spd_pullback<T>(matrices<T>(g), static_cast<const T*>(weight.const_data_ptr()),
                                          static_cast<T*>(out.mutable_data_ptr()), current_stream(g)));
  });
  return out;
}

// All but x are contiguous and float64.
Tensor gram_pullback(Tensor x, Tensor gram, Tensor inverse, Tensor logdet, Tensor trace,
                     Tensor frobenius_sq) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty(x, batch_sizes(x, {x.size(-2), x.size(-1)}), x.scalar_type());
  const auto read = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  const flatkern::GramCotangents g{read(logdet), read(trace), read(frobenius_sq), read(gram), read(inverse)};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::gram_pullback<T>(matrices<T>(x), g, static_cast<T*>(out.mutable_data_ptr()),
                                           current_stream(x)));
  });
  return out;
}

// `grams`: room for the Gram matrices, which may be where the vectors go.
void fill_spectrum(const Tensor& x, double floor, const Tensor& grams, const Tensor& values,
                   const Tensor* vectors) {
  check_sizes(x, flatkern::cuda::kMaxSpectrum, false);
  const auto write = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::gram_spectrum<T>(matrices<T>(x), floor, write(grams), write(values),
                                           vectors ? write(*vectors) : nullptr, current_stream(x)));
  });
}

Tensor gram_singular_values(Tensor x, bool precise) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::int64_t c = x.size(-2);
  Tensor values = empty(x, batch_sizes(x, {c}), ScalarType::Double);
  const Tensor grams = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  fill_spectrum(x, precise ? flatkern::cpu::kGramFloor : 0, grams, values, nullptr);
  return values;
}

std::tuple<Tensor, Tensor> gram_singular_vectors(Tensor x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::int64_t c = x.size(-2);
  Tensor values = empty(x, batch_sizes(x, {c}), ScalarType::Double);
  Tensor vectors = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  fill_spectrum(x, flatkern::cpu::kGramFloor, vectors, values, &vectors);
  return {values, vectors};
}

// `generate` launches for the rows of a type.
template <typename Generate>
Tensor random_rows(const Tensor& like, std::int64_t rows, std::int64_t size, const Generate& generate) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Tensor out = empty(like, {rows, size}, like.scalar_type());
  dispatch(like, [&](auto zero) {
    check(generate(static_cast<decltype(zero)*>(out.mutable_data_ptr()), current_stream(like)));
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
  cpu::check_contiguous_dots(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::int64_t lines = x.size(0) * x.size(1);
  Tensor out = empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  Tensor partial = empty(x, {lines, flatkern::cuda::probe_blocks(x.size(2))}, ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(flatkern::cuda::rademacher_dots<T>(
        seed, first, x.size(0), x.size(1), x.size(2), static_cast<const T*>(x.const_data_ptr()),
        static_cast<double*>(partial.mutable_data_ptr()), static_cast<double*>(out.mutable_data_ptr()),
        current_stream(x)));
  });
  return out;
}

std::tuple<Tensor, Tensor> lanczos_step(Tensor image, Tensor current, Tensor previous, Tensor beta,
                                        Tensor residual) {
  cpu::check_step(image, current, previous, beta, residual);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const std::int64_t k = image.size(0), size = image.size(1);
  Tensor alpha = empty(image, {k}, ScalarType::Double), norm = empty(image, {k}, ScalarType::Double);
  Tensor partial = empty(image, {k, flatkern::cuda::lanczos_blocks(size)}, ScalarType::Double);
  dispatch(image, [&](auto zero) {
    using T = decltype(zero);
    const auto rows = [](const Tensor& t) {
      return flatkern::cuda::Strided<const T>{static_cast<const T*>(t.const_data_ptr()), t.stride(0)};
    };
    check(flatkern::cuda::lanczos_step<T>(
        k, size, rows(image), rows(current), rows(previous),
        static_cast<const double*>(beta.const_data_ptr()),
        {static_cast<T*>(residual.mutable_data_ptr()), residual.stride(0)},
        static_cast<double*>(partial.mutable_data_ptr()), static_cast<double*>(alpha.mutable_data_ptr()),
        static_cast<double*>(norm.mutable_data_ptr()), current_stream(image)));
  });
  return {alpha, norm};
}

}  // namespace cuda
#endif

}  // namespace

STABLE_TORCH_LIBRARY(flatkern, m) {
  m.def("spd_logdet(Tensor g) -> Tensor");
  m.def("spd_pullback(Tensor g, Tensor weight) -> Tensor");
  m.def("gram(Tensor x) -> Tensor");
  m.def("gram_stats(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gram_stats_factors(Tensor x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gram_pullback(Tensor x, Tensor gram, Tensor inverse, Tensor logdet, Tensor trace, Tensor frobenius_sq)"
      " -> Tensor");
  m.def("gram_singular_values(Tensor x, bool precise) -> Tensor");
  m.def("gram_singular_vectors(Tensor x) -> (Tensor, Tensor)");
  m.def("lq_factor(Tensor x, Tensor wanted) -> Tensor");
  m.def("rademacher(Tensor like, int seed, int first, int rows, int size) -> Tensor");
  m.def("normal(Tensor like, int seed, int first, int rows, int size) -> Tensor");
  m.def("rademacher_dot(Tensor x, int seed, int first) -> Tensor");
  m.def(
      "lanczos_step(Tensor image, Tensor current, Tensor previous, Tensor beta, Tensor(a!) residual) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  m.impl("spd_logdet", TORCH_BOX(&cpu::spd_logdet));
  m.impl("spd_pullback", TORCH_BOX(&cpu::spd_pullback));
  m.impl("gram", TORCH_BOX(&cpu::gram));
  m.impl("gram_stats", TORCH_BOX(&cpu::gram_stats));
  m.impl("gram_stats_factors", TORCH_BOX(&cpu::gram_stats_factors));
  m.impl("gram_pullback", TORCH_BOX(&cpu::gram_pullback));
  m.impl("gram_singular_values", TORCH_BOX(&cpu::gram_singular_values));
  m.impl("gram_singular_vectors", TORCH_BOX(&cpu::gram_singular_vectors));
  m.impl("lq_factor", TORCH_BOX(&cpu::lq_factor));
  m.impl("rademacher", TORCH_BOX(&cpu::rademacher));
  m.impl("normal", TORCH_BOX(&cpu::normal));
  m.impl("rademacher_dot", TORCH_BOX(&cpu::rademacher_dot));
  m.impl("lanczos_step", TORCH_BOX(&cpu::lanczos_step));
}

#ifdef FLATKERN_CUDA
STABLE_TORCH_LIBRARY_IMPL(flatkern, CUDA, m) {
  m.impl("spd_logdet", TORCH_BOX(&cuda::spd_logdet));
  m.impl("gram", TORCH_BOX(&cuda::gram));
  m.impl("gram_stats", TORCH_BOX(&cuda::gram_stats));
  m.impl("gram_stats_factors", TORCH_BOX(&cuda::gram_stats_factors));
  m.impl("spd_pullback", TORCH_BOX(&cuda::spd_pullback));
  m.impl("gram_pullback", TORCH_BOX(&cuda::gram_pullback));
  m.impl("gram_singular_values", TORCH_BOX(&cuda::gram_singular_values));
  m.impl("gram_singular_vectors", TORCH_BOX(&cuda::gram_singular_vectors));
  m.impl("rademacher", TORCH_BOX(&cuda::rademacher));
  m.impl("normal", TORCH_BOX(&cuda::normal));
  m.impl("rademacher_dot", TORCH_BOX(&cuda::rademacher_dot));
  m.impl("lanczos_step", TORCH_BOX(&cuda::lanczos_step));
}
#endif
