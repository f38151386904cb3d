// The CPU kernels of every instruction set that this processor has, against plain loops in long double.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

namespace {

using flatkern::GramStatsOut;
using flatkern::Matrices;
using flatkern::cpu::Kernels;
using flatkern::cpu::kernels_for;

std::vector<double> gaussians(std::int64_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> out(static_cast<std::size_t>(n));
  for (double& v : out) v = normal(engine);
  return out;
}

long double plain_logdet(std::vector<long double> a, int c) {
  long double sum = 0;
  for (int k = 0; k < c; ++k) {
    sum += std::log(a[k * c + k]);
    for (int i = k + 1; i < c; ++i) {
      const long double l = a[i * c + k] / a[k * c + k];
      for (int j = k + 1; j < c; ++j) a[i * c + j] -= l * a[k * c + j];
    }
  }
  return sum;
}

template <typename T>
std::vector<long double> plain_gram(const T* x, int c, int d) {
  std::vector<long double> g(static_cast<std::size_t>(c) * c);
  for (int i = 0; i < c; ++i) {
    for (int j = 0; j < c; ++j) {
      for (int k = 0; k < d; ++k) g[i * c + j] += static_cast<long double>(x[i * d + k]) * x[j * d + k];
    }
  }
  return g;
}

template <typename T>
Matrices<T> contiguous(const std::vector<T>& x, std::int64_t n, int rows, int cols) {
  Matrices<T> m;
  m.data = x.data();
  m.batch.push(n, static_cast<std::int64_t>(rows) * cols);
  m.rows = rows, m.cols = cols, m.row_stride = cols, m.col_stride = 1;
  return m;
}

class CpuKernels : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  const Kernels* table() const { return kernels_for(std::get<0>(GetParam()).c_str()); }
  int size() const { return std::get<1>(GetParam()); }

  template <typename T>
  void check(double tolerance) {
    const Kernels* kernels = table();
    if (!kernels) GTEST_SKIP() << "not on this processor";
    const int c = size(), d = 2 * c + 3, n = 19;
    const std::vector<double> normals = gaussians(static_cast<std::int64_t>(n) * c * d, 7);
    const std::vector<T> x(normals.begin(), normals.end());
    const Matrices<T> m = contiguous(x, n, c, d);
    std::vector<double> logdet(n), trace(n), frobenius_sq(n), grams(static_cast<std::size_t>(n) * c * c);
    std::vector<char> deficient(n, 1);
    const GramStatsOut out{logdet.data(), trace.data(), frobenius_sq.data(),
                           reinterpret_cast<bool*>(deficient.data())};
    // in two ranges, as two threads would
    kernels->of(T{}).gram_stats(m, 0, 5, out);
    kernels->of(T{}).gram_stats(m, 5, n, out);
    kernels->of(T{}).gram(m, 0, n, grams.data());
    std::vector<T> matrices(grams.begin(), grams.end());
    std::vector<T> spd(n), inverse(matrices.size());
    kernels->of(T{}).spd_logdet(contiguous(matrices, n, c, c), 0, n, spd.data());
    kernels->of(T{}).spd_inverse(contiguous(matrices, n, c, c), 0, n, inverse.data());
    for (int s = 0; s < n; ++s) {
      const std::vector<long double> g = plain_gram(x.data() + s * c * d, c, d);
      const double expected = static_cast<double>(plain_logdet(g, c));
      long double t = 0, f = 0;
      for (int i = 0; i < c; ++i) {
        t += g[i * c + i];
        for (int j = 0; j < c; ++j) {
          f += g[i * c + j] * g[i * c + j];
          EXPECT_NEAR(grams[(s * c + i) * c + j], static_cast<double>(g[i * c + j]), 1e-11 * d);
          double identity = 0;
          for (int k = 0; k < c; ++k) {
            identity += static_cast<double>(inverse[(s * c + i) * c + k]) * grams[(s * c + k) * c + j];
          }
          EXPECT_NEAR(identity, i == j ? 1.0 : 0.0, 100 * tolerance);
        }
      }
      EXPECT_NEAR(logdet[s], expected, 1e-11 * c);
      EXPECT_NEAR(trace[s] / static_cast<double>(t), 1, 1e-13);
      EXPECT_NEAR(frobenius_sq[s] / static_cast<double>(f), 1, 1e-13);
      EXPECT_EQ(deficient[s], 0);
      EXPECT_NEAR(spd[s], expected, tolerance * (1 + std::abs(expected)));
    }
  }
};

TEST_P(CpuKernels, MatchPlainLoopsInFloat) {
  check<float>(1e-4);
}
TEST_P(CpuKernels, MatchPlainLoopsInDouble) {
  check<double>(1e-12);
}

TEST_P(CpuKernels, ZeroMatricesAreRankDeficientAndNanPropagates) {
  const Kernels* kernels = table();
  if (!kernels) GTEST_SKIP() << "not on this processor";
  const int c = size();
  std::vector<double> g(static_cast<std::size_t>(2) * c * c);
  g[static_cast<std::size_t>(c) * c + (c - 1) * c] = std::nan("");
  double out[2];
  kernels->f64.spd_logdet(contiguous(g, 2, c, c), 0, 2, out);
  EXPECT_EQ(out[0], -INFINITY);
  EXPECT_TRUE(std::isnan(out[1]));
}

INSTANTIATE_TEST_SUITE_P(Sizes, CpuKernels,
                         testing::Combine(testing::Values("baseline", "avx2", "avx512"),
                                          testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 31, 33)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" + std::to_string(std::get<1>(info.param));
                         });

}  // namespace
