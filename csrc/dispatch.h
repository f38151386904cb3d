// What the torch doors share: from a tensor's dtype to a C++ type, and new tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace flatkern {

// Contiguous, on the device of `like`.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, const std::vector<std::int64_t>& sizes,
                                   torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

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
