// From a tensor's dtype to a C++ type, for the torch doors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <utility>

namespace flatkern {

// Calls f with a value of the C++ type that belongs to the tensor's dtype.
template <typename F>
void dispatch(const torch::stable::Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return std::forward<F>(f)(float{});
    case torch::headeronly::ScalarType::Double:
      return std::forward<F>(f)(double{});
    default:
      STD_TORCH_CHECK(false, "flatkern: supported dtypes are float32 and float64");
  }
}

}  // namespace flatkern
