// The NumPy door: the same kernels for callers without tensors, and what the build and the processor offer.
// Arguments are checked in flatkern/native.py; what would be unsafe is checked here again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/probe_rows.h"
#include "threads.h"

#ifndef FLATKERN_BUILD_FLAGS
#define FLATKERN_BUILD_FLAGS ""
#endif
#ifndef FLATKERN_CUDA_ARCHITECTURES
#define FLATKERN_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

void bind_ghost(py::module_& m);  // ghost_bindings.cpp
void bind_jets(py::module_& m);   // jet_bindings.cpp

namespace {

using flatkern::Matrices;
using flatkern::spread;
using flatkern::cpu::kernels;

std::vector<py::ssize_t> batch_shape(const py::array& x, std::initializer_list<py::ssize_t> rest = {}) {
  std::vector<py::ssize_t> shape(x.shape(), x.shape() + x.ndim() - 2);
  shape.insert(shape.end(), rest);
  return shape;
}

template <typename T>
Matrices<T> matrices(const py::array& x, bool square) {
  if (x.ndim() < 2) throw py::value_error("expected an array of at least two dimensions");
  Matrices<T> m;
  const int dims = static_cast<int>(x.ndim());
  for (int k = 0; k < dims; ++k) {
    if (x.strides(k) % static_cast<py::ssize_t>(sizeof(T)) != 0) {
      throw py::value_error("strides must be multiples of the element size");
    }
  }
  const auto stride = [&](int k) { return x.strides(k) / static_cast<py::ssize_t>(sizeof(T)); };
  m.data = static_cast<const T*>(x.data());
  if (reinterpret_cast<std::uintptr_t>(m.data) % alignof(T) != 0) throw py::value_error("unaligned array");
  m.rows = x.shape(dims - 2), m.cols = x.shape(dims - 1);
  m.row_stride = stride(dims - 2), m.col_stride = stride(dims - 1);
  if (square && m.rows != m.cols) throw py::value_error("the matrices must be square");
  if (m.rows > flatkern::cpu::kMaxSize) throw py::value_error("too many rows for the compiled kernel");
  for (int k = 0; k + 2 < dims; ++k) {
    if (!m.batch.push(x.shape(k), stride(k))) throw py::value_error("too many separate batch dimensions");
  }
  return m;
}

template <typename F>
py::object dispatch(const py::array& x, F&& f) {
  if (py::isinstance<py::array_t<float>>(x)) return f(float{});
  if (py::isinstance<py::array_t<double>>(x)) return f(double{});
  throw py::type_error("supported dtypes are float32 and float64");
}

py::object spd_logdet(const py::array& g, int threads) {
  return dispatch(g, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(g, true);
    py::array_t<T> out(batch_shape(g));
    T* to = out.mutable_data();
    spread(m.batch.count(), flatkern::cpu::grain_spd(m.rows), threads,
           [&](std::int64_t begin, std::int64_t end) { kernels().of(zero).spd_logdet(m, begin, end, to); });
    return out;
  });
}

py::object gram(const py::array& x, int threads) {
  return dispatch(x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(x, false);
    py::array_t<double> out(batch_shape(x, {m.rows, m.rows}));
    double* to = out.mutable_data();
    spread(m.batch.count(), flatkern::cpu::grain_gram(m.rows, m.cols), threads,
           [&](std::int64_t begin, std::int64_t end) { kernels().of(zero).gram(m, begin, end, to); });
    return out;
  });
}

py::object gram_stats(const py::array& x, int threads) {
  return dispatch(x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(x, false);
    py::array_t<double> logdet(batch_shape(x)), trace(batch_shape(x)), frobenius_sq(batch_shape(x));
    py::array_t<double> pivot_ratio(batch_shape(x));
    py::array_t<bool> rank_deficient(batch_shape(x));
    py::array_t<std::int64_t> bad_pivots(batch_shape(x));
    const flatkern::GramStatsOut to = {logdet.mutable_data(),
                                       trace.mutable_data(),
                                       frobenius_sq.mutable_data(),
                                       rank_deficient.mutable_data(),
                                       pivot_ratio.mutable_data(),
                                       bad_pivots.mutable_data(),
                                       nullptr,
                                       nullptr};
    spread(m.batch.count(), flatkern::cpu::grain_gram(m.rows, m.cols), threads,
           [&](std::int64_t begin, std::int64_t end) { kernels().of(zero).gram_stats(m, begin, end, to); });
    return py::make_tuple(logdet, trace, frobenius_sq, rank_deficient, pivot_ratio, bad_pivots);
  });
}

py::object gram_singular_values(const py::array& x, int threads) {
  return dispatch(x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const Matrices<T> m = matrices<T>(x, false);
    if (m.rows > flatkern::cpu::kMaxSpectrum) throw py::value_error("too many rows for the compiled kernel");
    py::array_t<double> out(batch_shape(x, {m.rows}));
    double* to = out.mutable_data();
    spread(m.batch.count(), flatkern::cpu::grain_spectrum(m.rows, m.cols), threads,
           [&](std::int64_t begin, std::int64_t end) {
             kernels().of(zero).gram_spectrum(m, flatkern::cpu::kGramFloor, begin, end, to, nullptr);
           });
    return out;
  });
}

// -- random rows and the step of Lanczos; arrays come C-contiguous from flatkern/native.py
auto on_threads(int threads) {
  return [threads](std::int64_t n, std::int64_t grain, const auto& f) { spread(n, grain, threads, f); };
}

template <typename T>
const T* contiguous(const py::array& x, py::ssize_t dims) {
  if (x.ndim() != dims || !(x.flags() & py::array::c_style)) throw py::value_error("expected C order");
  return static_cast<const T*>(x.data());
}

// `like`: an array of the dtype that is wanted
template <bool normals>
py::object random_rows(const py::array& like, std::uint64_t seed, std::uint64_t first, py::ssize_t rows,
                       py::ssize_t size, int threads) {
  return dispatch(like, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const auto& table = kernels().probes->of(zero);
    py::array_t<T> out({rows, size});
    flatkern::cpu::random_rows(normals ? table.normal : table.rademacher, seed, first, rows, size,
                               out.mutable_data(), on_threads(threads));
    return out;
  });
}

py::object rademacher_dot(const py::array& x, std::uint64_t seed, std::uint64_t first, int threads) {
  return dispatch(x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const T* from = contiguous<T>(x, 3);
    py::array_t<double> out({x.shape(0), x.shape(1)});
    flatkern::cpu::rademacher_dots(seed, first, x.shape(0), x.shape(1), x.shape(2), from, out.mutable_data(),
                                   on_threads(threads));
    return out;
  });
}

py::object lanczos_step(const py::array& image, const py::array& current, const py::array& previous,
                        const py::array_t<double>& beta, int threads) {
  return dispatch(image, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const py::ssize_t rows = image.ndim() == 2 ? image.shape(0) : 0, size = rows ? image.shape(1) : 0;
    const auto from = [&](const py::array& x) {
      const T* data = contiguous<T>(x, 2);
      if (!py::isinstance<py::array_t<T>>(x) || x.shape(0) != rows || x.shape(1) != size) {
        throw py::value_error("the arrays must have one shape and dtype");
      }
      return flatkern::cpu::Rows<const T>{data, size};
    };
    if (beta.size() != rows) throw py::value_error("beta must have one entry a row");
    py::array_t<T> residual({rows, size});
    py::array_t<double> alpha(rows), norm(rows);
    flatkern::cpu::lanczos_step<T>(rows, size, from(image), from(current), from(previous),
                                   contiguous<double>(beta, 1), {residual.mutable_data(), size},
                                   alpha.mutable_data(), norm.mutable_data(), on_threads(threads));
    return py::make_tuple(residual, alpha, norm);
  });
}

py::dict build_info() {
  std::vector<std::string> available;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (flatkern::cpu::kernels_for(isa)) available.emplace_back(isa);
  }
  py::dict info;
  info["isa"] = kernels().isa;
  info["isa_available"] = available;
  info["vector_bytes"] = kernels().vector_bytes;
  info["max_size"] = flatkern::cpu::kMaxSize;
  info["max_spectrum"] = flatkern::cpu::kMaxSpectrum;
  info["compiler"] = "g++ compatible " __VERSION__;
  info["flags"] = FLATKERN_BUILD_FLAGS;
#ifdef FLATKERN_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_architectures"] = FLATKERN_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "flatkern's kernels over NumPy arrays; use flatkern.native, which checks the arguments.";
  m.def("spd_logdet", &spd_logdet, py::arg("g"), py::arg("threads") = 1);
  m.def("gram", &gram, py::arg("x"), py::arg("threads") = 1);
  m.def("gram_stats", &gram_stats, py::arg("x"), py::arg("threads") = 1);
  for (const bool normals : {false, true}) {
    m.def(normals ? "normal" : "rademacher", normals ? &random_rows<true> : &random_rows<false>,
          py::arg("like"), py::arg("seed"), py::arg("first"), py::arg("rows"), py::arg("size"),
          py::arg("threads") = 1);
  }
  m.def("rademacher_dot", &rademacher_dot, py::arg("x"), py::arg("seed"), py::arg("first"),
        py::arg("threads") = 1);
  m.def("lanczos_step", &lanczos_step, py::arg("image"), py::arg("current"), py::arg("previous"),
        py::arg("beta"), py::arg("threads") = 1);
  m.def("gram_singular_values", &gram_singular_values, py::arg("x"), py::arg("threads") = 1);
  m.def("build_info", &build_info);
  bind_ghost(m);
  bind_jets(m);
}
