// The torch door of convolutions pulled back from scattered cotangents (CPU). Operands are contiguous and
// checked in Python (flatkern/kernels); what would be unsafe is checked here again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "dispatch.h"

namespace {

using flatkern::dispatch;
using flatkern::ScatteredConv;
using flatkern::cpu::kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

void check(const Tensor& x, ScalarType dtype, const Sizes& shape) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous(),
                  "flatkern: an operand has a wrong dtype or strides");
  bool same = x.dim() == static_cast<std::int64_t>(shape.size());
  for (std::size_t d = 0; same && d < shape.size(); ++d)
    same = x.size(static_cast<std::int64_t>(d)) == shape[d];
  STD_TORCH_CHECK(same, "flatkern: an operand has a wrong shape");
}

// `settings`: input rows and columns, output rows and columns, stride, padding, dilation (two each).
ScatteredConv shape_of(const Tensor& values, const Tensor& index, std::int64_t in_channels,
                       std::int64_t kernel_rows, std::int64_t kernel_cols, const Sizes& settings) {
  STD_TORCH_CHECK(values.dim() == 4, "flatkern: expected values [n, k, channels, entries]");
  STD_TORCH_CHECK(settings.size() == 10, "flatkern: expected ten settings");
  check(values, values.scalar_type(), {values.size(0), values.size(1), values.size(2), values.size(3)});
  check(index, ScalarType::Long, {values.size(0), values.size(2), values.size(3)});
  const ScatteredConv s = {values.size(1), values.size(2), values.size(3), in_channels,
                           settings[0],    settings[1],    settings[2],    settings[3],
                           kernel_rows,    kernel_cols,    settings[4],    settings[5],
                           settings[6],    settings[7],    settings[8],    settings[9]};
  STD_TORCH_CHECK(s.padded() < std::int64_t(1) << 31 && s.places() < std::int64_t(1) << 31,
                  "flatkern: the plane has more than 2^31 entries");
  const auto fits = [](std::int64_t size, std::int64_t out, std::int64_t kernel, std::int64_t stride,
                       std::int64_t dilation) {
    return out >= 1 && kernel >= 1 && stride >= 1 && dilation >= 1 &&
           (out - 1) * stride + (kernel - 1) * dilation < size;
  };
  STD_TORCH_CHECK(s.padding_rows >= 0 && s.padding_cols >= 0 &&
                      fits(s.padded_rows(), s.out_rows, s.kernel_rows, s.stride_rows, s.dilation_rows) &&
                      fits(s.padded_cols(), s.out_cols, s.kernel_cols, s.stride_cols, s.dilation_cols),
                  "flatkern: the output does not belong to this input and kernel");
  return s;
}

std::int64_t grain(const ScatteredConv& s) {
  const std::int64_t work = s.channels * s.entries * s.taps() * s.in_channels * ((s.cotangents + 15) / 16);
  return 300000 / (work + 1) + 1;  // some 100 us of work a thread
}

// weight: [channels, kernel_rows, kernel_cols, in_channels].
Tensor scattered_conv_input(Tensor values, Tensor index, Tensor weight, Sizes settings) {
  STD_TORCH_CHECK(weight.dim() == 4, "flatkern: expected a weight [channels, rows, columns, in_channels]");
  const ScatteredConv s = shape_of(values, index, weight.size(3), weight.size(1), weight.size(2), settings);
  check(weight, values.scalar_type(), {s.channels, s.kernel_rows, s.kernel_cols, s.in_channels});
  const Sizes shape = {values.size(0), s.cotangents, s.in_channels, s.rows, s.cols};
  Tensor out = torch::stable::new_empty(values, {shape.data(), shape.size()}, values.scalar_type());
  dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const T* v = static_cast<const T*>(values.const_data_ptr());
    const auto* at = static_cast<const std::int64_t*>(index.const_data_ptr());
    const T* w = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const auto& table = kernels().scattered(zero);
    torch::stable::parallel_for(0, values.size(0), grain(s), [&](std::int64_t begin, std::int64_t end) {
      std::vector<char> scratch(static_cast<std::size_t>(table.bytes(s, true)));
      table.input(s, v, at, w, begin, end, scratch.data(), to);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scattered_conv_norms(Tensor values, Tensor index, Tensor input,
                                                        std::int64_t kernel_rows, std::int64_t kernel_cols,
                                                        Sizes settings) {
  STD_TORCH_CHECK(input.dim() == 4, "flatkern: expected an input [n, in_channels, rows, columns]");
  const ScatteredConv s = shape_of(values, index, input.size(1), kernel_rows, kernel_cols, settings);
  check(input, values.scalar_type(), {values.size(0), s.in_channels, s.rows, s.cols});
  const Sizes one = {values.size(0)}, planes = {values.size(0), s.places()};
  Tensor weight_sq = torch::stable::new_empty(values, {one.data(), one.size()}, ScalarType::Double);
  Tensor bias_sq = torch::stable::new_empty(values, {one.data(), one.size()}, ScalarType::Double);
  Tensor place_sq = torch::stable::new_empty(values, {planes.data(), planes.size()}, ScalarType::Double);
  dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    const T* v = static_cast<const T*>(values.const_data_ptr());
    const auto* at = static_cast<const std::int64_t*>(index.const_data_ptr());
    const T* x = static_cast<const T*>(input.const_data_ptr());
    auto* of_weight = static_cast<double*>(weight_sq.mutable_data_ptr());
    auto* of_bias = static_cast<double*>(bias_sq.mutable_data_ptr());
    auto* of_place = static_cast<double*>(place_sq.mutable_data_ptr());
    const auto& table = kernels().scattered(zero);
    torch::stable::parallel_for(0, values.size(0), grain(s), [&](std::int64_t begin, std::int64_t end) {
      std::vector<char> scratch(static_cast<std::size_t>(table.bytes(s, false)));
      table.norms(s, v, at, x, begin, end, scratch.data(), of_weight, of_bias, of_place);
    });
  });
  return {weight_sq, bias_sq, place_sq};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flatkern, m) {
  m.def("scattered_conv_input(Tensor values, Tensor index, Tensor weight, int[] settings) -> Tensor");
  m.def(
      "scattered_conv_norms(Tensor values, Tensor index, Tensor input, int kernel_rows, int kernel_cols, "
      "int[] settings) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  m.impl("scattered_conv_input", TORCH_BOX(&scattered_conv_input));
  m.impl("scattered_conv_norms", TORCH_BOX(&scattered_conv_norms));
}
