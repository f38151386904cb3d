// The CUDA kernels that have no place in a table of the CPU's (tables.h), on the host: random rows, dots with
// them and the step of Lanczos against the CPU's, attention against the same passes without a launch.
#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/probe_rows.h"
#include "cuda/attention.h"
#include "cuda/kernels.h"
#include "numbers.h"

namespace {

using namespace flatkern;
using numbers::count;
using numbers::gaussians;
using numbers::normals;

void here(std::int64_t n, std::int64_t, const std::function<void(std::int64_t, std::int64_t)>& f) {
  if (n > 0) f(0, n);
}

template <typename T>
void probes(std::int64_t rows, std::int64_t size) {
  const std::uint64_t seed = 77, first = (std::uint64_t(1) << 40) + 3;
  const auto& table = cpu::kernels().probes->of(T{});
  std::vector<T> got(count(rows, size), T(9)), expected(got);
  EXPECT(cuda::rademacher<T>(seed, first, rows, size, got.data(), nullptr) == 0);
  cpu::random_rows(table.rademacher, seed, first, rows, size, expected.data(), here);
  EXPECT(got == expected);
  EXPECT(cuda::normal<T>(seed, first, rows, size, got.data(), nullptr) == 0);
  cpu::random_rows(table.normal, seed, first, rows, size, expected.data(), here);
  EXPECT(got == expected);

  const std::int64_t batch = 2;
  const std::vector<T> x = normals<T>(batch * rows * size, 1);
  std::vector<double> partial(count(batch * rows, cuda::probe_blocks(size))), dots(count(batch * rows)),
      same(dots);
  EXPECT(cuda::rademacher_dots<T>(seed, first, batch, rows, size, x.data(), partial.data(), dots.data(),
                                  nullptr) == 0);
  cpu::rademacher_dots<T>(seed, first, batch, rows, size, x.data(), same.data(), here);
  for (std::size_t i = 0; i < dots.size(); ++i)
    EXPECT_NEAR(dots[i], same[i], 1e-12 * static_cast<double>(size));
}

template <typename T>
void lanczos(std::int64_t rows, std::int64_t size, double tolerance) {
  const std::int64_t stride = size + 3;
  const std::vector<T> w = normals<T>(rows * stride, 1), v = normals<T>(rows * stride, 2),
                       u = normals<T>(rows * stride, 3);
  const std::vector<double> beta = gaussians(count(rows), 4);
  std::vector<T> got(count(rows, stride), T(9)), expected(got);
  std::vector<double> partial(count(rows, cuda::lanczos_blocks(size))), alpha(count(rows)), norm(alpha),
      a(alpha), b(alpha);
  EXPECT(cuda::lanczos_step<T>(rows, size, {w.data(), stride}, {v.data(), stride}, {u.data(), stride},
                               beta.data(), {got.data(), stride}, partial.data(), alpha.data(), norm.data(),
                               nullptr) == 0);
  cpu::lanczos_step<T>(rows, size, {w.data(), stride}, {v.data(), stride}, {u.data(), stride}, beta.data(),
                       {expected.data(), stride}, a.data(), b.data(), here);
  for (std::size_t i = 0; i < alpha.size(); ++i) {
    EXPECT_NEAR(alpha[i], a[i], tolerance * static_cast<double>(size));
    EXPECT_NEAR(norm[i], b[i], tolerance * (1 + b[i]));
  }
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double allowed =
        tolerance * (10 + std::sqrt(static_cast<double>(size)) * std::fabs(static_cast<double>(expected[i])));
    EXPECT_NEAR(static_cast<double>(got[i]), static_cast<double>(expected[i]), allowed);
  }
}

using Floats = std::vector<float>;

// Bit for bit: the arithmetic is the same, in the same order.
template <typename Pass>
void launched(const Pass& pass, std::initializer_list<Floats*> results) {
  attention::on_host(pass);
  std::vector<Floats> expected;
  for (Floats* result : results) {
    expected.push_back(*result);
    for (float& x : *result) x = NAN;
  }
  EXPECT(cuda::run(pass, nullptr) == 0);
  std::size_t k = 0;
  for (const Floats* result : results) EXPECT(*result == expected[k++]);
}

template <bool twice>
void sums(const Attention<float>& a, std::int64_t mask_entries) {
  Floats q(count(a.batch, a.queries, a.width)), k(count(a.batch, a.keys, a.width)),
      v(count(a.batch, a.keys, a.value_width)), mask(count(mask_entries));
  launched(attention::QuerySums<float, twice>{a, q.data()}, {&q});
  launched(attention::KeySums<float, twice>{a, k.data(), v.data()}, {&k, &v});
  if (mask_entries) launched(attention::MaskSums<float, twice>{a, mask.data()}, {&mask});
}

void attend(std::int64_t batch, std::int64_t queries, std::int64_t keys, int width, int value_width,
            bool causal, bool additive) {
  const Floats q = normals<float>(batch * queries * width, 1), k = normals<float>(batch * keys * width, 2),
               v = normals<float>(batch * keys * value_width, 3),
               g = normals<float>(batch * queries * value_width, 4),
               dq = normals<float>(batch * queries * width, 5), dk = normals<float>(batch * keys * width, 6),
               dv = normals<float>(batch * keys * value_width, 7),
               dg = normals<float>(batch * queries * value_width, 8),
               mask = normals<float>(queries * keys, 9), dmask = normals<float>(queries * keys, 10),
               row = normals<float>(batch * queries, 11), other = normals<float>(batch * queries, 12),
               third = normals<float>(batch * queries, 13);
  Attention<float> a;
  a.batch = batch, a.queries = queries, a.keys = keys, a.width = width, a.value_width = value_width;
  a.scale = 0.3f, a.causal = causal;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.g = g.data(), a.dg = dg.data();
  a.dq = dq.data(), a.dk = dk.data(), a.dv = dv.data();
  if (additive) {
    a.additive = mask.data(), a.dmask = dmask.data(), a.masks = 1, a.mask_rows = queries, a.mask_cols = keys;
    a.places.push(batch, 0);
  }
  Floats out(g.size()), stats(2 * row.size()), image(g.size()), mean(row.size());
  launched(attention::Forward<float>{a, out.data(), stats.data()}, {&out, &stats});
  a.stats = stats.data();
  launched(attention::Tangent<float>{a, out.data(), image.data(), mean.data()}, {&image, &mean});
  a.total = row.data(), a.mean = other.data(), a.change = third.data();
  const std::int64_t entries = additive ? queries * keys : 0;
  sums<false>(a, entries);
  sums<true>(a, entries);
}

}  // namespace

int main() {
  for (const std::int64_t size : {1, 3, 127, 128, 129, 5000, 70001}) {
    const std::string name = "rows of " + std::to_string(size);
    check::context = name.c_str();
    probes<float>(3, size);
    probes<double>(2, size);
    lanczos<float>(3, size, 1e-6);
    lanczos<double>(2, size, 1e-14);
  }
  check::context = "attention";
  attend(2, 5, 3, 2, 3, false, false);
  attend(2, 70, 65, 9, 5, false, true);
  attend(1, 130, 130, 32, 128, true, false);
  return check::result("CUDA launches");
}
