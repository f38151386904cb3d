// The NumPy door of the ghost norm; see ghost_ops.cpp. flatkern/native.py checks the arguments.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using flatkern::Batch;
using flatkern::cpu::kernels;

template <typename T>
Batch axis(const py::array& x, py::ssize_t begin, py::ssize_t end) {
  Batch out;
  for (py::ssize_t d = begin; d < end; ++d) {
    const py::ssize_t stride = x.strides(d);
    if (stride % static_cast<py::ssize_t>(sizeof(T)) != 0) {
      throw py::value_error("strides must be multiples of the element size");
    }
    if (!out.push(x.shape(d), stride / static_cast<py::ssize_t>(sizeof(T)))) {
      throw py::value_error("too many separate dimensions");
    }
  }
  return out;
}

template <typename T>
py::object ghost_norm_of(const py::array& a, const py::array& g, py::ssize_t position_dims, bool formed,
                         int threads) {
  const py::ssize_t samples = g.ndim() - 2 - position_dims, features = samples + position_dims;
  if (position_dims < 1 || samples < 0 || a.ndim() <= features) throw py::value_error("too few dimensions");
  for (py::ssize_t d = 0; d < features; ++d) {
    if (a.shape(d) != g.shape(d + 1)) throw py::value_error("samples and positions must be the same");
  }
  for (const py::array& x : {a, g}) {
    if (reinterpret_cast<std::uintptr_t>(x.data()) % alignof(T) != 0)
      throw py::value_error("unaligned array");
  }
  flatkern::GhostInput<T> x;
  x.a = {static_cast<const T*>(a.data()), axis<T>(a, 0, samples), axis<T>(a, samples, features),
         axis<T>(a, features, a.ndim())};
  x.g = {static_cast<const T*>(g.data()), axis<T>(g, 1, samples + 1), axis<T>(g, samples + 1, features + 1),
         axis<T>(g, features + 1, features + 2)};
  x.cotangents = g.shape(0), x.cotangent_stride = g.strides(0) / static_cast<py::ssize_t>(sizeof(T));
  x.positions = x.a.positions.count(), x.d_in = x.a.features.count(), x.d_out = g.shape(features + 1);
  py::array_t<double> out(std::vector<py::ssize_t>(g.shape(), g.shape() + samples + 1));
  double* to = out.mutable_data();
  flatkern::spread(
      x.a.samples.count(), flatkern::cpu::grain_ghost(x.cotangents, x.positions, x.d_in, x.d_out, formed),
      threads,
      [&](std::int64_t begin, std::int64_t end) { kernels().of(T{}).ghost_norm(x, formed, begin, end, to); });
  return out;
}

py::object ghost_norm(const py::array& a, const py::array& g, py::ssize_t position_dims, bool formed,
                      int threads) {
  if (py::isinstance<py::array_t<float>>(a) && py::isinstance<py::array_t<float>>(g)) {
    return ghost_norm_of<float>(a, g, position_dims, formed, threads);
  }
  if (py::isinstance<py::array_t<double>>(a) && py::isinstance<py::array_t<double>>(g)) {
    return ghost_norm_of<double>(a, g, position_dims, formed, threads);
  }
  throw py::type_error("expected two arrays of float32 or of float64");
}

}  // namespace

void bind_ghost(py::module_& m) {
  m.def("ghost_norm", &ghost_norm, py::arg("a"), py::arg("g"), py::arg("position_dims"), py::arg("formed"),
        py::arg("threads") = 1);
}
