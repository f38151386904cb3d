// The NumPy door: the same kernels for callers without tensors, and what the build and the processor offer.
// Arguments are checked in flatkern/native.py; what would be unsafe is checked here again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

#ifndef FLATKERN_BUILD_FLAGS
#define FLATKERN_BUILD_FLAGS ""
#endif
#ifndef FLATKERN_CUDA_ARCHITECTURES
#define FLATKERN_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

using flatkern::Matrices;
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

// Runs f on ranges of [0, n), on as many threads as have enough to do, without the interpreter lock.
template <typename F>
void spread(std::int64_t n, std::int64_t grain, int threads, const F& f) {
  const py::gil_scoped_release release;
  const std::int64_t parts = std::min<std::int64_t>(std::max(threads, 1), (n + grain - 1) / grain);
  if (parts <= 1) {
    if (n > 0) f(std::int64_t{0}, n);
    return;
  }
  std::vector<std::thread> pool;
  for (std::int64_t p = 1; p < parts; ++p) pool.emplace_back(f, n * p / parts, n * (p + 1) / parts);
  f(std::int64_t{0}, n / parts);
  for (std::thread& t : pool) t.join();
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
  m.def("gram_singular_values", &gram_singular_values, py::arg("x"), py::arg("threads") = 1);
  m.def("build_info", &build_info);
}
