// The NumPy door of the jets. flatkern/native.py makes the arrays contiguous and checks them; sizes are
// checked here again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using flatkern::ActivationSpec;
using flatkern::cpu::kernels;
template <typename T>
using Dense = py::array_t<T, py::array::c_style>;
template <typename T>
using Maybe = std::optional<Dense<T>>;

template <typename T>
const T* in(const Dense<T>& x, py::ssize_t entries) {
  if (x.size() != entries) throw py::value_error("an operand has another number of entries than it should");
  return x.data();
}

template <typename T>
const T* in(const Maybe<T>& x, py::ssize_t entries) {
  return x ? in(*x, entries) : nullptr;
}

template <typename T>
Dense<T> like(const Dense<T>& x) {
  return Dense<T>(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
}

// One number a tangent and row.
template <typename T>
Dense<T> row_numbers(const Dense<T>& t) {
  return Dense<T>(std::vector<py::ssize_t>(t.shape(), t.shape() + t.ndim() - 1));
}

ActivationSpec spec_of(int kind, double a, double b) {
  if (kind < 0 || kind >= static_cast<int>(flatkern::Activation::count))
    throw py::value_error("unknown activation");
  return {static_cast<flatkern::Activation>(kind), a, b};
}

template <typename F>
void spread_chunks(std::int64_t n, std::int64_t k, int threads, const F& f) {
  flatkern::spread(flatkern::cpu::jet_chunks(n), flatkern::cpu::grain_chunks(k), threads, f);
}

template <typename T, typename Args>
void spread_rows(const Args& args, int threads, void (*kernel)(const Args&, std::int64_t, std::int64_t, T*)) {
  flatkern::spread(
      args.rows, flatkern::cpu::grain_rows(args.cols, args.k), threads,
      [&](std::int64_t begin, std::int64_t end) {
        std::vector<T> scratch(static_cast<std::size_t>(flatkern::cpu::scratch_entries(args.cols)));
        kernel(args, begin, end, scratch.data());
      });
}

struct Rows {
  std::int64_t rows = 1, cols, k;

  Rows(const py::array& z, const py::array& t) : cols(z.shape(z.ndim() - 1)), k(t.shape(0)) {
    if (cols >= std::int64_t(1) << 31) throw py::value_error("a row has more than 2^31 entries");
    for (py::ssize_t d = 0; d + 1 < z.ndim(); ++d) rows *= z.shape(d);
  }
};

template <typename T>
void bind(py::module_& m) {
  using A = const Dense<T>&;
  m.def("activation_derivatives", [](A z, int kind, double a, double b, int threads) {
    const ActivationSpec spec = spec_of(kind, a, b);
    Dense<T> value = like(z), slope = like(z), bend = like(z);
    const flatkern::ActivationDerivativesArgs<T> args = {z.data(), value.mutable_data(), slope.mutable_data(),
                                                         bend.mutable_data()};
    const std::int64_t n = z.size();
    spread_chunks(n, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().jets(T{}).derivatives(spec, args, n, begin, end);
    });
    return py::make_tuple(value, slope, bend);
  });
  m.def("activation_jet", [](A z, A t, const Maybe<T>& s, int kind, double a, double b, int threads) {
    const ActivationSpec spec = spec_of(kind, a, b);
    const std::int64_t n = z.size(), k = t.shape(0);
    Dense<T> value = like(z), first = like(t), second = like(t);
    const flatkern::ActivationJetArgs<T> args = {z.data(),
                                                 in(t, k * n),
                                                 in(s, k * n),
                                                 k,
                                                 value.mutable_data(),
                                                 first.mutable_data(),
                                                 second.mutable_data()};
    spread_chunks(n, k, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().jets(T{}).jet(spec, args, n, begin, end);
    });
    return py::make_tuple(value, first, second);
  });
  m.def("activation_pullback", [](A z, A g, A t, A dg, int kind, double a, double b, int threads) {
    const ActivationSpec spec = spec_of(kind, a, b);
    const std::int64_t n = z.size(), k = t.shape(0);
    Dense<T> cotangent = like(z), tangents = like(t);
    const flatkern::ActivationPullbackArgs<T> args = {z.data(),
                                                      in(g, n),
                                                      in(t, k * n),
                                                      in(dg, k * n),
                                                      k,
                                                      cotangent.mutable_data(),
                                                      tangents.mutable_data()};
    spread_chunks(n, k, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().jets(T{}).pullback(spec, args, n, begin, end);
    });
    return py::make_tuple(cotangent, tangents);
  });
  m.def("softmax_curvature", [](A p, A t, A g, bool log, int threads) {
    const Rows r(p, t);
    Dense<T> curvature = row_numbers(t);
    const flatkern::SoftmaxCurvatureArgs<T> args = {
        r.rows, r.cols, r.k, p.data(), in(t, r.k * p.size()), in(g, p.size()), log, curvature.mutable_data()};
    spread_rows<T>(args, threads, kernels().jets(T{}).softmax_curvature);
    return curvature;
  });
  m.def("cross_entropy_hvp", [](A z, const Maybe<T>& scale, A v, int threads) {
    const Rows r(z, v);
    Dense<T> product = like(v);
    const flatkern::LogSumExpArgs<T> args = {r.rows,
                                             r.cols,
                                             r.k,
                                             z.data(),
                                             in(scale, r.rows),
                                             in(v, r.k * z.size()),
                                             nullptr,
                                             nullptr,
                                             product.mutable_data()};
    spread_rows<T>(args, threads, kernels().jets(T{}).logsumexp);
    return product;
  });
  m.def("norm_tangent", [](A unit, A inverse, A t, const Maybe<T>& weight, int threads) {
    const Rows r(unit, t);
    Dense<T> tangent = like(t);
    const flatkern::NormTangentArgs<T> args = {r.rows,
                                               r.cols,
                                               r.k,
                                               unit.data(),
                                               in(inverse, r.rows),
                                               in(t, r.k * unit.size()),
                                               in(weight, r.cols),
                                               tangent.mutable_data()};
    spread_rows<T>(args, threads, kernels().jets(T{}).norm_tangent);
    return tangent;
  });
  m.def("norm_curvature", [](A unit, A inverse, A t, A g, const Maybe<T>& weight, int threads) {
    const Rows r(unit, t);
    Dense<T> curvature = row_numbers(t);
    const flatkern::NormCurvatureArgs<T> args = {r.rows,
                                                 r.cols,
                                                 r.k,
                                                 unit.data(),
                                                 in(inverse, r.rows),
                                                 in(t, r.k * unit.size()),
                                                 in(g, unit.size()),
                                                 in(weight, r.cols),
                                                 curvature.mutable_data()};
    spread_rows<T>(args, threads, kernels().jets(T{}).norm_curvature);
    return curvature;
  });
}

}  // namespace

void bind_jets(py::module_& m) {
  bind<float>(m);
  bind<double>(m);
}
