// The torch door of matrices: schemas and the code between tensors and raw pointers, on the stable ABI alone,
// so that one binary serves every torch from 2.11 on. Autograd, shapes for tracing and vmap are added in
// Python (flatkern/kernels), which also checks the arguments; nothing else calls these operators.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "dispatch.h"
#include "gpu_call.h"
#ifdef FLATKERN_CUDA
#include "cuda/kernels.h"
#endif

namespace {

using flatkern::dispatch;
using flatkern::empty;
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

}  // namespace cpu

#ifdef FLATKERN_CUDA
namespace cuda {

using flatkern::GpuCall;

Tensor spd_logdet(Tensor g) {
  check_sizes(g, flatkern::cuda::kMaxSize, true);
  const GpuCall call(g);
  Tensor out = empty(g, batch_sizes(g), g.scalar_type());
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::spd_logdet<T>(matrices<T>(g), static_cast<T*>(out.mutable_data_ptr()),
                                             call.stream()));
  });
  return out;
}

Tensor gram(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const GpuCall call(x);
  const std::int64_t c = x.size(x.dim() - 2);
  Tensor out = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    call.check(
        flatkern::cuda::gram<T>(matrices<T>(x), static_cast<double*>(out.mutable_data_ptr()), call.stream()));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_stats(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const GpuCall call(x);
  const StatsTensors out(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::gram_stats<T>(matrices<T>(x), out.pointers(), call.stream()));
  });
  return out.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_stats_factors(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const GpuCall call(x);
  const StatsTensors out(x);
  const std::int64_t c = x.size(-2);
  Tensor gram = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  Tensor inverse = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  flatkern::GramStatsOut to = out.pointers();
  to.gram = static_cast<double*>(gram.mutable_data_ptr());
  to.inverse = static_cast<double*>(inverse.mutable_data_ptr());
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::gram_stats<T>(matrices<T>(x), to, call.stream()));
  });
  return std::tuple_cat(out.tuple(), std::make_tuple(gram, inverse));
}

// `weight`: contiguous, of g's dtype, one a sample.
Tensor spd_pullback(Tensor g, Tensor weight) {
  check_sizes(g, flatkern::cuda::kMaxSize, true);
  const GpuCall call(g);
  const std::int64_t c = g.size(-1);
  Tensor out = empty(g, batch_sizes(g, {c, c}), g.scalar_type());
  dispatch(g, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::spd_pullback<T>(matrices<T>(g), static_cast<const T*>(weight.const_data_ptr()),
                                               static_cast<T*>(out.mutable_data_ptr()), call.stream()));
  });
  return out;
}

// All but x are contiguous and float64.
Tensor gram_pullback(Tensor x, Tensor gram, Tensor inverse, Tensor logdet, Tensor trace,
                     Tensor frobenius_sq) {
  check_sizes(x, flatkern::cuda::kMaxSize, false);
  const GpuCall call(x);
  Tensor out = empty(x, batch_sizes(x, {x.size(-2), x.size(-1)}), x.scalar_type());
  const auto read = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  const flatkern::GramCotangents g{read(logdet), read(trace), read(frobenius_sq), read(gram), read(inverse)};
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::gram_pullback<T>(matrices<T>(x), g, static_cast<T*>(out.mutable_data_ptr()),
                                                call.stream()));
  });
  return out;
}

// `grams`: room for the Gram matrices, which may be where the vectors go.
void fill_spectrum(const GpuCall& call, const Tensor& x, double floor, const Tensor& grams,
                   const Tensor& values, const Tensor* vectors) {
  const auto write = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    call.check(flatkern::cuda::gram_spectrum<T>(matrices<T>(x), floor, write(grams), write(values),
                                                vectors ? write(*vectors) : nullptr, call.stream()));
  });
}

Tensor gram_singular_values(Tensor x, bool precise) {
  check_sizes(x, flatkern::cuda::kMaxSpectrum, false);
  const GpuCall call(x);
  const std::int64_t c = x.size(-2);
  Tensor values = empty(x, batch_sizes(x, {c}), ScalarType::Double);
  const Tensor grams = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  fill_spectrum(call, x, precise ? flatkern::cpu::kGramFloor : 0, grams, values, nullptr);
  return values;
}

std::tuple<Tensor, Tensor> gram_singular_vectors(Tensor x) {
  check_sizes(x, flatkern::cuda::kMaxSpectrum, false);
  const GpuCall call(x);
  const std::int64_t c = x.size(-2);
  Tensor values = empty(x, batch_sizes(x, {c}), ScalarType::Double);
  Tensor vectors = empty(x, batch_sizes(x, {c, c}), ScalarType::Double);
  fill_spectrum(call, x, flatkern::cpu::kGramFloor, vectors, values, &vectors);
  return {values, vectors};
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
}

STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  m.impl("lq_factor", TORCH_BOX(&cpu::lq_factor));
#ifndef FLATKERN_EMULATED_CUDA
  m.impl("spd_logdet", TORCH_BOX(&cpu::spd_logdet));
  m.impl("spd_pullback", TORCH_BOX(&cpu::spd_pullback));
  m.impl("gram", TORCH_BOX(&cpu::gram));
  m.impl("gram_stats", TORCH_BOX(&cpu::gram_stats));
  m.impl("gram_stats_factors", TORCH_BOX(&cpu::gram_stats_factors));
  m.impl("gram_pullback", TORCH_BOX(&cpu::gram_pullback));
  m.impl("gram_singular_values", TORCH_BOX(&cpu::gram_singular_values));
  m.impl("gram_singular_vectors", TORCH_BOX(&cpu::gram_singular_vectors));
#endif
}

#ifdef FLATKERN_CUDA
FLATKERN_GPU_IMPL(m) {
  m.impl("spd_logdet", TORCH_BOX(&cuda::spd_logdet));
  m.impl("gram", TORCH_BOX(&cuda::gram));
  m.impl("gram_stats", TORCH_BOX(&cuda::gram_stats));
  m.impl("gram_stats_factors", TORCH_BOX(&cuda::gram_stats_factors));
  m.impl("spd_pullback", TORCH_BOX(&cuda::spd_pullback));
  m.impl("gram_pullback", TORCH_BOX(&cuda::gram_pullback));
  m.impl("gram_singular_values", TORCH_BOX(&cuda::gram_singular_values));
  m.impl("gram_singular_vectors", TORCH_BOX(&cuda::gram_singular_vectors));
}
#endif
