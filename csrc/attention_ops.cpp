// The torch door of attention: schemas, outputs and raw pointers. flatkern/kernels calls these operators for
// CUDA tensors alone; on the CPU, where its form in PyTorch is far quicker, they run the very loops of the
// CUDA kernels one thread after the other, which is how these are tested where there is no GPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/attention_runs.h"
#include "gpu_call.h"
#ifdef FLATKERN_CUDA
#include "cuda/attention.h"
#endif

namespace {

using flatkern::Attention;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<std::int64_t>;

Tensor empty(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Float);
}

void check(const Tensor& x, const Tensor& query, ScalarType dtype, std::int64_t entries) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "flatkern: attention's operands must be float32");
  STD_TORCH_CHECK(x.numel() == entries && x.is_contiguous(), "flatkern: an operand of attention has ",
                  x.numel(), " entries or is not contiguous, expected ", entries);
  STD_TORCH_CHECK(x.is_cuda() == query.is_cuda() && x.get_device_index() == query.get_device_index(),
                  "flatkern: attention's operands must be on one device");
}

const float* in(const Tensor& x, const Tensor& query, std::int64_t entries) {
  check(x, query, ScalarType::Float, entries);
  return static_cast<const float*>(x.const_data_ptr());
}

const float* in(const Maybe& x, const Tensor& query, std::int64_t entries) {
  return x ? in(*x, query, entries) : nullptr;
}

float* out(const Tensor& x) {
  return x.numel() ? static_cast<float*>(x.mutable_data_ptr()) : nullptr;
}

Attention<float> inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                        const Sizes& sizes, const Sizes& strides, double scale, bool causal) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "flatkern: expected [batch, length, width]");
  Attention<float> a;
  a.batch = q.size(0), a.queries = q.size(1), a.keys = k.size(1);
  STD_TORCH_CHECK(q.size(2) <= flatkern::kAttentionWidth && v.size(2) <= flatkern::kAttentionWidth,
                  "flatkern: heads of up to ", flatkern::kAttentionWidth, " expected");
  a.width = static_cast<int>(q.size(2)), a.value_width = static_cast<int>(v.size(2));
  a.scale = static_cast<float>(scale), a.causal = causal;
  a.q = in(q, q, q.numel());
  a.k = in(k, q, a.batch * a.keys * a.width);
  a.v = in(v, q, a.batch * a.keys * a.value_width);
  if (!mask) return a;
  STD_TORCH_CHECK(mask->dim() == 3 && sizes.size() == strides.size(),
                  "flatkern: expected a mask [masks, Lq, Lk]");
  a.masks = mask->size(0), a.mask_rows = mask->size(1), a.mask_cols = mask->size(2);
  STD_TORCH_CHECK(
      (a.mask_rows == 1 || a.mask_rows == a.queries) && (a.mask_cols == 1 || a.mask_cols == a.keys),
      "flatkern: the mask does not fit");
  std::int64_t last = 0;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    STD_TORCH_CHECK(strides[d] >= 0 && a.places.push(sizes[d], strides[d]),
                    "flatkern: the mask's places are not understood");
    last += (sizes[d] - 1) * strides[d];
  }
  STD_TORCH_CHECK(a.places.count() == a.batch && last < a.masks, "flatkern: the mask's places do not fit");
  if (mask->scalar_type() == ScalarType::Bool) {
    check(*mask, q, ScalarType::Bool, mask->numel());
    a.allowed = static_cast<const bool*>(mask->const_data_ptr());
  } else {
    a.additive = in(*mask, q, mask->numel());
  }
  return a;
}

void add_tangents(Attention<float>& a, const Tensor& q, const Maybe& dq, const Maybe& dk, const Maybe& dv,
                  const Maybe& dmask) {
  a.dq = in(dq, q, a.batch * a.queries * a.width);
  a.dk = in(dk, q, a.batch * a.keys * a.width);
  a.dv = in(dv, q, a.batch * a.keys * a.value_width);
  STD_TORCH_CHECK(!dmask || a.additive, "flatkern: a tangent of a mask that is not additive");
  a.dmask = in(dmask, q, a.masks * a.mask_rows * a.mask_cols);
}

// Runs passes where the queries lie: on the current stream of a GPU, or on the host.
class Runner {
 public:
#ifdef FLATKERN_CUDA
  explicit Runner(const Tensor& q) {
    if (flatkern::on_gpu(q)) call_.emplace(q);
  }
#else
  explicit Runner(const Tensor&) {}
#endif

  template <typename Pass>
  void operator()(const Pass& pass) const {
#ifdef FLATKERN_CUDA
    if (call_) return call_->check(flatkern::cuda::run(pass, call_->stream()));
#endif
    flatkern::attention::on_host(pass);
  }

 private:
#ifdef FLATKERN_CUDA
  std::optional<flatkern::GpuCall> call_;
#endif
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Maybe mask, Sizes sizes, Sizes strides,
                                   double scale, bool causal) {
  const Attention<float> a = inputs(q, k, v, mask, sizes, strides, scale, causal);
  const Runner run(q);
  Tensor result = empty(q, {a.batch, a.queries, a.value_width}), stats = empty(q, {a.batch, a.queries, 2});
  run(flatkern::attention::Forward<float>{a, out(result), out(stats)});
  return {result, stats};
}

std::tuple<Tensor, Tensor> tangent(Tensor q, Tensor k, Tensor v, Maybe mask, Tensor stats, Tensor o, Maybe dq,
                                   Maybe dk, Maybe dv, Maybe dmask, Sizes sizes, Sizes strides, double scale,
                                   bool causal) {
  Attention<float> a = inputs(q, k, v, mask, sizes, strides, scale, causal);
  add_tangents(a, q, dq, dk, dv, dmask);
  a.stats = in(stats, q, 2 * a.batch * a.queries);
  const Runner run(q);
  Tensor image = empty(q, {a.batch, a.queries, a.value_width}), mean = empty(q, {a.batch, a.queries});
  run(flatkern::attention::Tangent<float>{a, in(o, q, image.numel()), out(image), out(mean)});
  return {image, mean};
}

// Empty where not needed.
template <bool twice>
std::tuple<Tensor, Tensor, Tensor, Tensor> sums(const Attention<float>& a, const Tensor& q, bool need_q,
                                                bool need_k, bool need_v, bool need_mask) {
  STD_TORCH_CHECK(!need_mask || a.additive, "flatkern: the gradient of a mask that is not additive");
  const Runner run(q);
  const auto wanted = [&](bool need, const Sizes& sizes) { return empty(q, need ? sizes : Sizes{0}); };
  Tensor to_q = wanted(need_q, {a.batch, a.queries, a.width});
  Tensor to_k = wanted(need_k, {a.batch, a.keys, a.width});
  Tensor to_v = wanted(need_v, {a.batch, a.keys, a.value_width});
  Tensor to_mask = wanted(need_mask, {a.masks, a.mask_rows, a.mask_cols});
  run(flatkern::attention::QuerySums<float, twice>{a, out(to_q)});
  run(flatkern::attention::KeySums<float, twice>{a, out(to_k), out(to_v)});
  run(flatkern::attention::MaskSums<float, twice>{a, out(to_mask)});
  return {to_q, to_k, to_v, to_mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient(Tensor q, Tensor k, Tensor v, Maybe mask, Tensor stats,
                                                    Tensor g, Tensor total, Sizes sizes, Sizes strides,
                                                    double scale, bool causal, bool need_q, bool need_k,
                                                    bool need_v, bool need_mask) {
  Attention<float> a = inputs(q, k, v, mask, sizes, strides, scale, causal);
  a.stats = in(stats, q, 2 * a.batch * a.queries);
  a.g = in(g, q, a.batch * a.queries * a.value_width);
  a.total = in(total, q, a.batch * a.queries);
  return sums<false>(a, q, need_q, need_k, need_v, need_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> second(Tensor q, Tensor k, Tensor v, Maybe mask, Tensor stats,
                                                  Tensor g, Tensor total, Tensor mean, Tensor change,
                                                  Maybe dq, Maybe dk, Maybe dv, Maybe dmask, Maybe dg,
                                                  Sizes sizes, Sizes strides, double scale, bool causal,
                                                  bool need_q, bool need_k, bool need_v, bool need_mask) {
  Attention<float> a = inputs(q, k, v, mask, sizes, strides, scale, causal);
  add_tangents(a, q, dq, dk, dv, dmask);
  const std::int64_t rows = a.batch * a.queries;
  a.stats = in(stats, q, 2 * rows);
  a.g = in(g, q, rows * a.value_width), a.dg = in(dg, q, rows * a.value_width);
  a.total = in(total, q, rows), a.mean = in(mean, q, rows), a.change = in(change, q, rows);
  return sums<true>(a, q, need_q, need_k, need_v, need_mask);
}

}  // namespace

#define FLATKERN_INPUTS "Tensor q, Tensor k, Tensor v, Tensor? mask"
#define FLATKERN_TANGENTS "Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask"
#define FLATKERN_FORM "int[] sizes, int[] strides, float scale, bool causal"
#define FLATKERN_NEEDS "bool need_q, bool need_k, bool need_v, bool need_mask"

// `sizes` and `strides`: entry b of the batch, written in the mixed radix of the sizes and dotted with the
// strides, is the number of its mask.
STABLE_TORCH_LIBRARY_FRAGMENT(flatkern, m) {
  m.def("attention_forward(" FLATKERN_INPUTS ", " FLATKERN_FORM ") -> (Tensor, Tensor)");
  m.def("attention_tangent(" FLATKERN_INPUTS ", Tensor stats, Tensor out, " FLATKERN_TANGENTS
        ", " FLATKERN_FORM ") -> (Tensor, Tensor)");
  m.def("attention_gradient(" FLATKERN_INPUTS ", Tensor stats, Tensor g, Tensor total, " FLATKERN_FORM
        ", " FLATKERN_NEEDS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_second(" FLATKERN_INPUTS
        ", Tensor stats, Tensor g, Tensor total, Tensor mean, Tensor change, " FLATKERN_TANGENTS
        ", Tensor? dg, " FLATKERN_FORM ", " FLATKERN_NEEDS ") -> (Tensor, Tensor, Tensor, Tensor)");
}

#define FLATKERN_ATTENTION(m)                         \
  m.impl("attention_forward", TORCH_BOX(&forward));   \
  m.impl("attention_tangent", TORCH_BOX(&tangent));   \
  m.impl("attention_gradient", TORCH_BOX(&gradient)); \
  m.impl("attention_second", TORCH_BOX(&second))

STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m) {
  FLATKERN_ATTENTION(m);
}

#if defined(FLATKERN_CUDA) && !defined(FLATKERN_EMULATED_CUDA)
FLATKERN_GPU_IMPL(m) {
  FLATKERN_ATTENTION(m);
}
#endif
