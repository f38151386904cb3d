// The torch door of the jets: schemas, outputs and raw pointers. Operands are contiguous and checked in
// Python (flatkern/kernels); what would be unsafe is checked here again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "gpu_call.h"
#ifdef FLATKERN_CUDA
#include "cuda/jets.h"
#endif

namespace {

using flatkern::ActivationSpec;
using flatkern::Bf16;
using flatkern::wide_t;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

Tensor like(const Tensor& x, ScalarType dtype, std::size_t dims) {
  const auto sizes = x.sizes();
  return torch::stable::new_empty(x, {sizes.data(), dims}, dtype);
}

Tensor like(const Tensor& x) {
  return like(x, x.scalar_type(), x.sizes().size());
}

template <typename F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(Bf16{});
    default:
      STD_TORCH_CHECK(false, "flatkern: supported dtypes are float32, float64 and bfloat16");
  }
}

void check_operand(const Tensor& x, const Tensor& primal, std::int64_t entries) {
  STD_TORCH_CHECK(x.scalar_type() == primal.scalar_type(), "flatkern: dtypes differ");
  STD_TORCH_CHECK(x.numel() == entries, "flatkern: an operand or result has ", x.numel(), " entries, not ",
                  entries);
  STD_TORCH_CHECK(x.is_contiguous(), "flatkern: operands and results must be contiguous");
}

template <typename E>
const E* in(const Tensor& x, const Tensor& primal, std::int64_t entries) {
  check_operand(x, primal, entries);
  return static_cast<const E*>(x.const_data_ptr());
}

template <typename E>
const E* in(const Maybe& x, const Tensor& primal, std::int64_t entries) {
  return x ? in<E>(*x, primal, entries) : nullptr;
}

template <typename E>
E* out(const Tensor& x, const Tensor& primal, std::int64_t entries) {
  check_operand(x, primal, entries);
  return static_cast<E*>(x.mutable_data_ptr());
}

ActivationSpec spec_of(std::int64_t kind, double a, double b) {
  STD_TORCH_CHECK(kind >= 0 && kind < static_cast<std::int64_t>(flatkern::Activation::count),
                  "flatkern: unknown activation ", kind);
  return {static_cast<flatkern::Activation>(kind), a, b};
}

struct Rows {
  std::int64_t rows, cols, k;

  Rows(const Tensor& z, const Tensor& t) : rows(0), cols(z.size(z.dim() - 1)), k(t.size(0)) {
    STD_TORCH_CHECK(cols < std::int64_t(1) << 31, "flatkern: a row has more than 2^31 entries");
    rows = cols ? z.numel() / cols : 0;
  }
  std::int64_t all() const { return rows * cols; }
};

// How the work is spread: over torch's threads on the CPU, one launch on the current stream on a GPU.
template <typename E, typename Args>
void run_chunks(const Tensor& z, std::int64_t k, const ActivationSpec& spec, const Args& args,
                void (*kernel)(const ActivationSpec&, const Args&, std::int64_t, std::int64_t,
                               std::int64_t)) {
  const std::int64_t n = z.numel();
#ifdef FLATKERN_CUDA
  if (flatkern::on_gpu(z)) {
    const flatkern::GpuCall call(z);
    return call.check(flatkern::cuda::run(spec, args, n, call.stream()));
  }
#endif
  torch::stable::parallel_for(
      0, flatkern::cpu::jet_chunks(n), flatkern::cpu::grain_chunks(k),
      [&](std::int64_t begin, std::int64_t end) { kernel(spec, args, n, begin, end); });
}

template <typename E, typename Args>
void run_rows(const Tensor& z, const Args& args,
              void (*kernel)(const Args&, std::int64_t, std::int64_t, wide_t<E>*)) {
#ifdef FLATKERN_CUDA
  if (flatkern::on_gpu(z)) {
    const flatkern::GpuCall call(z);
    return call.check(flatkern::cuda::run(args, call.stream()));
  }
#endif
  torch::stable::parallel_for(
      0, args.rows, flatkern::cpu::grain_rows(args.cols, args.k), [&](std::int64_t begin, std::int64_t end) {
        std::vector<wide_t<E>> scratch(static_cast<std::size_t>(flatkern::cpu::scratch_entries(args.cols)));
        kernel(args, begin, end, scratch.data());
      });
}

using flatkern::cpu::kernels;

void activation_derivatives_out(Tensor z, std::int64_t kind, double a, double b, Tensor value, Tensor slope,
                                Tensor bend) {
  const ActivationSpec spec = spec_of(kind, a, b);
  dispatch(z, [&](auto zero) {
    using E = decltype(zero);
    const std::int64_t n = z.numel();
    const flatkern::ActivationDerivativesArgs<E> args = {in<E>(z, z, n), out<E>(value, z, n),
                                                         out<E>(slope, z, n), out<E>(bend, z, n)};
    run_chunks<E>(z, 1, spec, args, kernels().jets(zero).derivatives);
  });
}

std::tuple<Tensor, Tensor, Tensor> activation_derivatives(Tensor z, std::int64_t kind, double a, double b) {
  Tensor value = like(z), slope = like(z), bend = like(z);
  activation_derivatives_out(z, kind, a, b, value, slope, bend);
  return {value, slope, bend};
}

void activation_jet_out(Tensor z, Tensor t, Maybe s, std::int64_t kind, double a, double b, Tensor value,
                        Tensor first, Maybe second) {
  const ActivationSpec spec = spec_of(kind, a, b);
  dispatch(z, [&](auto zero) {
    using E = decltype(zero);
    const std::int64_t n = z.numel(), k = t.size(0);
    const flatkern::ActivationJetArgs<E> args = {in<E>(z, z, n),
                                                 in<E>(t, z, k * n),
                                                 in<E>(s, z, k * n),
                                                 k,
                                                 out<E>(value, z, n),
                                                 out<E>(first, z, k * n),
                                                 second ? out<E>(*second, z, k * n) : nullptr};
    run_chunks<E>(z, k, spec, args, kernels().jets(zero).jet);
  });
}

std::tuple<Tensor, Tensor, Tensor> activation_jet(Tensor z, Tensor t, Maybe s, std::int64_t kind, double a,
                                                  double b, std::int64_t order) {
  Tensor value = like(z), first = like(t);
  if (order == 2) {
    Tensor second = like(t);
    activation_jet_out(z, t, s, kind, a, b, value, first, second);
    return {value, first, second};
  }
  activation_jet_out(z, t, s, kind, a, b, value, first, std::nullopt);
  const std::int64_t none = 0;
  return {value, first, torch::stable::new_empty(z, {&none, 1}, z.scalar_type())};
}

void activation_pullback_out(Tensor z, Tensor g, Tensor t, Tensor dg, std::int64_t kind, double a, double b,
                             Tensor cotangent, Tensor tangents) {
  const ActivationSpec spec = spec_of(kind, a, b);
  dispatch(z, [&](auto zero) {
    using E = decltype(zero);
    const std::int64_t n = z.numel(), k = t.size(0);
    const flatkern::ActivationPullbackArgs<E> args = {in<E>(z, z, n),
                                                      in<E>(g, z, n),
                                                      in<E>(t, z, k * n),
                                                      in<E>(dg, z, k * n),
                                                      k,
                                                      out<E>(cotangent, z, n),
                                                      out<E>(tangents, z, k * n)};
    run_chunks<E>(z, k, spec, args, kernels().jets(zero).pullback);
  });
}

std::tuple<Tensor, Tensor> activation_pullback(Tensor z, Tensor g, Tensor t, Tensor dg, std::int64_t kind,
                                               double a, double b) {
  Tensor cotangent = like(z), tangents = like(t);
  activation_pullback_out(z, g, t, dg, kind, a, b, cotangent, tangents);
  return {cotangent, tangents};
}

// One number a tangent and row, in the dtype that E is computed in.
Tensor row_numbers(const Tensor& t) {
  const ScalarType wide = t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return like(t, wide, t.sizes().size() - 1);
}

template <typename E>
const wide_t<E>* row_numbers_in(const Tensor& x, std::int64_t rows) {
  const bool wide = x.scalar_type() == (sizeof(wide_t<E>) == 8 ? ScalarType::Double : ScalarType::Float);
  STD_TORCH_CHECK(wide && x.numel() == rows && x.is_contiguous(), "flatkern: there must be one number a row");
  return static_cast<const wide_t<E>*>(x.const_data_ptr());
}

Tensor softmax_curvature(Tensor p, Tensor t, Tensor g, bool log) {
  Tensor curvature = row_numbers(t);
  dispatch(p, [&](auto zero) {
    using E = decltype(zero);
    const Rows r(p, t);
    const flatkern::SoftmaxCurvatureArgs<E> args = {r.rows,
                                                    r.cols,
                                                    r.k,
                                                    in<E>(p, p, r.all()),
                                                    in<E>(t, p, r.k * r.all()),
                                                    in<E>(g, p, r.all()),
                                                    log,
                                                    static_cast<wide_t<E>*>(curvature.mutable_data_ptr())};
    run_rows<E>(p, args, kernels().jets(zero).softmax_curvature);
  });
  return curvature;
}

void logsumexp(const Tensor& z, const Maybe& scale, const Tensor& v, const Tensor* excess,
               const Tensor* gradient, const Tensor& product) {
  dispatch(z, [&](auto zero) {
    using E = decltype(zero);
    using T = wide_t<E>;
    const Rows r(z, v);
    const flatkern::LogSumExpArgs<E> args = {r.rows,
                                             r.cols,
                                             r.k,
                                             in<E>(z, z, r.all()),
                                             scale ? row_numbers_in<E>(*scale, r.rows) : nullptr,
                                             in<E>(v, z, r.k * r.all()),
                                             excess ? static_cast<T*>(excess->mutable_data_ptr()) : nullptr,
                                             gradient ? out<E>(*gradient, z, r.all()) : nullptr,
                                             out<E>(product, z, r.k * r.all())};
    run_rows<E>(z, args, kernels().jets(zero).logsumexp);
  });
}

Tensor cross_entropy_hvp(Tensor z, Maybe scale, Tensor v) {
  Tensor product = like(v);
  logsumexp(z, scale, v, nullptr, nullptr, product);
  return product;
}

std::tuple<Tensor, Tensor, Tensor> logsumexp_jet(Tensor z, Maybe scale, Tensor v) {
  const ScalarType wide = z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor excess = like(z, wide, z.sizes().size() - 1), gradient = like(z), product = like(v);
  logsumexp(z, scale, v, &excess, &gradient, product);
  return {excess, gradient, product};
}

Tensor norm_tangent(Tensor unit, Tensor inverse, Tensor t, Maybe weight) {
  Tensor tangent = like(t);
  dispatch(unit, [&](auto zero) {
    using E = decltype(zero);
    const Rows r(unit, t);
    const flatkern::NormTangentArgs<E> args = {r.rows,
                                               r.cols,
                                               r.k,
                                               in<E>(unit, unit, r.all()),
                                               row_numbers_in<E>(inverse, r.rows),
                                               in<E>(t, unit, r.k * r.all()),
                                               in<E>(weight, unit, r.cols),
                                               out<E>(tangent, unit, r.k * r.all())};
    run_rows<E>(unit, args, kernels().jets(zero).norm_tangent);
  });
  return tangent;
}

Tensor norm_curvature(Tensor unit, Tensor inverse, Tensor t, Tensor g, Maybe weight) {
  Tensor curvature = row_numbers(t);
  dispatch(unit, [&](auto zero) {
    using E = decltype(zero);
    const Rows r(unit, t);
    const flatkern::NormCurvatureArgs<E> args = {r.rows,
                                                 r.cols,
                                                 r.k,
                                                 in<E>(unit, unit, r.all()),
                                                 row_numbers_in<E>(inverse, r.rows),
                                                 in<E>(t, unit, r.k * r.all()),
                                                 in<E>(g, unit, r.all()),
                                                 in<E>(weight, unit, r.cols),
                                                 static_cast<wide_t<E>*>(curvature.mutable_data_ptr())};
    run_rows<E>(unit, args, kernels().jets(zero).norm_curvature);
  });
  return curvature;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flatkern, m) {
  m.def("activation_derivatives(Tensor z, int kind, float a, float b) -> (Tensor, Tensor, Tensor)");
  m.def(
      "activation_derivatives_out(Tensor z, int kind, float a, float b, Tensor(a!) value, Tensor(b!) slope, "
      "Tensor(c!) bend) -> ()");
  m.def(
      "activation_jet(Tensor z, Tensor t, Tensor? s, int kind, float a, float b, int order) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "activation_jet_out(Tensor z, Tensor t, Tensor? s, int kind, float a, float b, Tensor(a!) value, "
      "Tensor(b!) first, Tensor(c!)? second) -> ()");
  m.def(
      "activation_pullback(Tensor z, Tensor g, Tensor t, Tensor dg, int kind, float a, float b) -> "
      "(Tensor, Tensor)");
  m.def(
      "activation_pullback_out(Tensor z, Tensor g, Tensor t, Tensor dg, int kind, float a, float b, "
      "Tensor(a!) cotangent, Tensor(b!) tangents) -> ()");
  m.def("softmax_curvature(Tensor p, Tensor t, Tensor g, bool log) -> Tensor");
  m.def("cross_entropy_hvp(Tensor z, Tensor? scale, Tensor v) -> Tensor");
  m.def("logsumexp_jet(Tensor z, Tensor? scale, Tensor v) -> (Tensor, Tensor, Tensor)");
  m.def("norm_tangent(Tensor unit, Tensor inverse, Tensor t, Tensor? weight) -> Tensor");
  m.def("norm_curvature(Tensor unit, Tensor inverse, Tensor t, Tensor g, Tensor? weight) -> Tensor");
}

// one implementation for both: the work is sent to where the primal lies
#define FLATKERN_JETS(m)                                                        \
  m.impl("activation_derivatives", TORCH_BOX(&activation_derivatives));         \
  m.impl("activation_derivatives_out", TORCH_BOX(&activation_derivatives_out)); \
  m.impl("activation_jet", TORCH_BOX(&activation_jet));                         \
  m.impl("activation_jet_out", TORCH_BOX(&activation_jet_out));                 \
  m.impl("activation_pullback", TORCH_BOX(&activation_pullback));               \
  m.impl("activation_pullback_out", TORCH_BOX(&activation_pullback_out));       \
  m.impl("softmax_curvature", TORCH_BOX(&softmax_curvature));                   \
  m.impl("cross_entropy_hvp", TORCH_BOX(&cross_entropy_hvp));                   \
  m.impl("logsumexp_jet", TORCH_BOX(&logsumexp_jet));                           \
  m.impl("norm_tangent", TORCH_BOX(&norm_tangent));                             \
  m.impl("norm_curvature", TORCH_BOX(&norm_curvature))

STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  FLATKERN_JETS(m);
}

#if defined(FLATKERN_CUDA) && !defined(FLATKERN_EMULATED_CUDA)
FLATKERN_GPU_IMPL(m) {
  FLATKERN_JETS(m);
}
#endif
