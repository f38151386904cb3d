// The jets of every table (tables.h) against plain loops in double: every length around a vector and a chunk,
// ranges as threads would take them, results past the caches.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "numbers.h"
#include "tables.h"

namespace {

using namespace flatkern;
using cpu::JetKernels;
using numbers::normals;

template <typename T>
void activations(const JetKernels<T>& jets, std::int64_t n, double tolerance) {
  const std::int64_t k = 3, half = cpu::jet_chunks(n) / 2;
  const std::vector<T> z = normals<T>(n, 1), t = normals<T>(k * n, 2), s = normals<T>(k * n, 3),
                       g = normals<T>(n, 4);
  // a margin behind every result must stay as it was
  const T mark = T(-77);
  std::vector<T> value(n + 8, mark), slope(n + 8, mark), bend(n + 8, mark);
  std::vector<T> first(k * n + 8, mark), second(k * n + 8, mark), tangents(k * n + 8, mark),
      pulled(n + 8, mark);
  for (int kind = 0; kind < static_cast<int>(Activation::count); ++kind) {
    const ActivationSpec spec = {static_cast<Activation>(kind), 1, 20};
    const ActivationDerivativesArgs<T> d = {z.data(), value.data(), slope.data(), bend.data()};
    jets.derivatives(spec, d, n, 0, half);
    jets.derivatives(spec, d, n, half, cpu::jet_chunks(n));
    const ActivationJetArgs<T> j = {z.data(),      t.data(),     s.data(),     k,
                                    pulled.data(), first.data(), second.data()};
    jets.jet(spec, j, n, 0, half);
    jets.jet(spec, j, n, half, cpu::jet_chunks(n));
    for (std::int64_t i = 0; i < n; ++i) EXPECT(pulled[i] == value[i]);
    const ActivationPullbackArgs<T> p = {z.data(), g.data(),      t.data(),       s.data(),
                                         k,        pulled.data(), tangents.data()};
    jets.pullback(spec, p, n, 0, half);
    jets.pullback(spec, p, n, half, cpu::jet_chunks(n));
    for (std::int64_t i = 0; i < n; ++i) {
      const Three<double> f = three<double>(z[i], spec);
      EXPECT_NEAR(value[i], f.value, tolerance * (1 + std::abs(f.value)));
      EXPECT_NEAR(slope[i], f.slope, tolerance * 2);
      EXPECT_NEAR(bend[i], f.bend, tolerance * 2);
      EXPECT_NEAR(pulled[i], f.slope * g[i], tolerance * 8);
      for (std::int64_t e = i; e < k * n; e += n) {
        EXPECT_NEAR(first[e], f.slope * t[e], tolerance * 8);
        EXPECT_NEAR(second[e], f.bend * t[e] * t[e] + f.slope * s[e], tolerance * 32);
        EXPECT_NEAR(tangents[e], f.slope * s[e] + g[i] * f.bend * t[e], tolerance * 32);
      }
    }
  }
  for (int e = 0; e < 8; ++e) {
    EXPECT(value[n + e] == mark);
    EXPECT(pulled[n + e] == mark);
    EXPECT(first[k * n + e] == mark);
    EXPECT(second[k * n + e] == mark);
    EXPECT(tangents[k * n + e] == mark);
  }
}

template <typename T>
void rows(const JetKernels<T>& jets, std::int64_t n, double tolerance) {
  const std::int64_t k = 2, count = 5, all = n * count;
  const std::vector<T> z = normals<T>(all, 1), t = normals<T>(k * all, 2), g = normals<T>(all, 3);
  const std::vector<T> w = normals<T>(n, 5), scale = normals<T>(count, 6);
  std::vector<T> excess(count), product(k * all), scratch(cpu::scratch_entries(n));
  const LogSumExpArgs<T> l = {count,         n, k, z.data(), scale.data(), t.data(), excess.data(), nullptr,
                              product.data()};
  jets.logsumexp(l, 0, count, scratch.data());
  for (std::int64_t r = 0; r < count; ++r) {
    double sum = 0, top = -1e30;
    for (std::int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(z[r * n + i]));
    for (std::int64_t i = 0; i < n; ++i) top = std::max(top, static_cast<double>(z[r * n + i]));
    EXPECT_NEAR(excess[r], std::log(sum) - top, tolerance * 8);
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t at = (j * count + r) * n;
      double mean = 0;
      for (std::int64_t i = 0; i < n; ++i)
        mean += std::exp(static_cast<double>(z[r * n + i])) / sum * t[at + i];
      for (std::int64_t i = 0; i < n; ++i) {
        const double p = std::exp(static_cast<double>(z[r * n + i])) / sum, centred = t[at + i] - mean;
        EXPECT_NEAR(product[at + i], scale[r] * p * centred, tolerance * 32);
      }
    }
  }
  // any numbers in the place of probabilities and of what was normalized: the formulas are the same
  std::vector<T> tangent(k * all), bent(k * count), soft(k * count), log_soft(k * count);
  for (const auto& range : {std::make_pair(0, 2), std::make_pair(2, 5)}) {
    const std::int64_t begin = range.first, end = range.second;
    jets.norm_tangent({count, n, k, z.data(), scale.data(), t.data(), w.data(), tangent.data()}, begin, end,
                      nullptr);
    jets.norm_curvature({count, n, k, z.data(), scale.data(), t.data(), g.data(), w.data(), bent.data()},
                        begin, end, nullptr);
    jets.softmax_curvature({count, n, k, z.data(), t.data(), g.data(), false, soft.data()}, begin, end,
                           nullptr);
    jets.softmax_curvature({count, n, k, z.data(), t.data(), g.data(), true, log_soft.data()}, begin, end,
                           nullptr);
  }
  for (std::int64_t e = 0; e < k * count; ++e) {
    const std::int64_t r = e % count;
    const T *u = &z[r * n], *d = &t[e * n], *h = &g[r * n];
    const double size = static_cast<double>(n);
    double mean = 0, weighted = 0, along = 0, sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      mean += d[i] / size, weighted += static_cast<double>(u[i]) * d[i], sum += h[i];
      along += static_cast<double>(u[i]) * h[i];
    }
    double p = 0, q = 0, across = 0, onto = 0, one = 0, other = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double c = d[i] - mean, f = d[i] - weighted, y = static_cast<double>(h[i]) * w[i];
      p += u[i] * c / size, q += c * c / size, across += y * c, onto += y * u[i];
      one += u[i] * f * f * (h[i] - along), other += u[i] * f * f;
    }
    const double inverse = scale[r], scaled = (1 + std::abs(inverse)) * (1 + std::abs(inverse));
    const double slack = tolerance * 40 * (10 + size * size) * scaled;
    EXPECT_NEAR(bent[e], inverse * inverse * (onto * (3 * p * p - q) - 2 * p * across), slack);
    EXPECT_NEAR(soft[e], one,
                tolerance * (10 + 40 * size) * (1 + weighted * weighted) * (10 + std::abs(along)));
    EXPECT_NEAR(log_soft[e], -sum * other,
                tolerance * (10 + 40 * size) * (1 + weighted * weighted) * (10 + std::abs(sum)));
    for (std::int64_t i = 0; i < n; ++i) {
      EXPECT_NEAR(tangent[e * n + i], w[i] * (d[i] - mean - u[i] * p) * inverse, tolerance * 400 * scaled);
    }
  }
}
}  // namespace

int main() {
  for (const char* table : tables::kNames) {
    const cpu::Kernels* kernels = tables::named(table);
    if (!kernels) continue;
    for (const std::int64_t n : {0, 1, 3, 8, 16, 17, 33, 511, 512, 1100}) {
      const std::string name = std::string(table) + ", n = " + std::to_string(n);
      check::context = name.c_str();
      activations<float>(kernels->jets_f32, n, 3e-7);
      activations<double>(kernels->jets_f64, n, 1e-15);
      if (n == 0) continue;  // no columns
      rows<float>(kernels->jets_f32, n, 3e-7);
      rows<double>(kernels->jets_f64, n, 1e-15);
    }
  }
  return check::result("jets");
}
