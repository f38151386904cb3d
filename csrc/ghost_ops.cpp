// The torch door of the ghost norm: a tensor's leading, middle and last dimensions become samples, positions
// and features. Shapes are checked in Python (flatkern/kernels); what would be unsafe is checked here again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/kernels.h"
#include "dispatch.h"
#include "gpu_call.h"
#ifdef FLATKERN_CUDA
#include "cuda/ghost.h"
#endif

namespace {

using flatkern::Batch;
using flatkern::dispatch;
using flatkern::GhostInput;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Batch axis(const Tensor& x, std::int64_t begin, std::int64_t end) {
  Batch out;
  for (std::int64_t d = begin; d < end; ++d) {
    STD_TORCH_CHECK(out.push(x.size(d), x.stride(d)), "flatkern: more than ", flatkern::kMaxBatchDims,
                    " separate dimensions");
  }
  return out;
}

// a [*samples, *positions, *features], g [K, *samples, *positions, d_out].
template <typename T>
GhostInput<T> ghost_input(const Tensor& a, const Tensor& g, std::int64_t position_dims) {
  const std::int64_t samples = g.dim() - 2 - position_dims, features = samples + position_dims;
  STD_TORCH_CHECK(position_dims >= 1 && samples >= 0 && a.dim() > features,
                  "flatkern: a has too few dimensions");
  STD_TORCH_CHECK(a.scalar_type() == g.scalar_type(), "flatkern: the dtypes must be the same");
  for (std::int64_t d = 0; d < features; ++d) {
    STD_TORCH_CHECK(a.size(d) == g.size(d + 1), "flatkern: samples and positions must be the same");
  }
  GhostInput<T> x;
  x.a = {static_cast<const T*>(a.const_data_ptr()), axis(a, 0, samples), axis(a, samples, features),
         axis(a, features, a.dim())};
  x.g = {static_cast<const T*>(g.const_data_ptr()), axis(g, 1, samples + 1),
         axis(g, samples + 1, features + 1), axis(g, features + 1, features + 2)};
  x.cotangents = g.size(0), x.cotangent_stride = g.stride(0);
  x.positions = x.a.positions.count(), x.d_in = x.a.features.count(), x.d_out = g.size(features + 1);
  return x;
}

Tensor empty_result(const Tensor& g, std::int64_t position_dims) {
  const auto sizes = g.sizes();
  const std::vector<std::int64_t> shape(sizes.begin(), sizes.end() - 1 - position_dims);
  return torch::stable::new_empty(g, {shape.data(), shape.size()}, ScalarType::Double);
}

namespace cpu {

Tensor ghost_norm(Tensor a, Tensor g, std::int64_t position_dims, bool formed) {
  Tensor out = empty_result(g, position_dims);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  dispatch(g, [&](auto zero) {
    const auto x = ghost_input<decltype(zero)>(a, g, position_dims);
    torch::stable::parallel_for(
        0, x.a.samples.count(),
        flatkern::cpu::grain_ghost(x.cotangents, x.positions, x.d_in, x.d_out, formed),
        [&](std::int64_t begin, std::int64_t end) {
          flatkern::cpu::kernels().of(zero).ghost_norm(x, formed, begin, end, to);
        });
  });
  return out;
}

}  // namespace cpu

#ifdef FLATKERN_CUDA
namespace cuda {

Tensor ghost_norm(Tensor a, Tensor g, std::int64_t position_dims, bool formed) {
  const flatkern::GpuCall call(g);
  Tensor out = empty_result(g, position_dims);
  dispatch(g, [&](auto zero) {
    const auto x = ghost_input<decltype(zero)>(a, g, position_dims);
    const std::int64_t lines = x.cotangents * x.a.samples.count(),
                       blocks = flatkern::cuda::ghost_blocks(x, formed);
    const std::int64_t room[] = {lines, blocks};
    Tensor partial = torch::stable::new_empty(g, {room, 2}, ScalarType::Double);
    call.check(flatkern::cuda::ghost_norm(x, formed, blocks, static_cast<double*>(partial.mutable_data_ptr()),
                                          static_cast<double*>(out.mutable_data_ptr()), call.stream()));
  });
  return out;
}

}  // namespace cuda
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flatkern, m) {
  m.def("ghost_norm(Tensor a, Tensor g, int position_dims, bool formed) -> Tensor");
}

#ifndef FLATKERN_EMULATED_CUDA
STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  m.impl("ghost_norm", TORCH_BOX(&cpu::ghost_norm));
}
#endif

#ifdef FLATKERN_CUDA
FLATKERN_GPU_IMPL(m) {
  m.impl("ghost_norm", TORCH_BOX(&cuda::ghost_norm));
}
#endif
