// The kernels of matrices of every table (tables.h) against plain loops in long double. No framework, and
// buffers of exactly the size of their contents: `make test-sanitize` runs it under AddressSanitizer and
// UndefinedBehaviorSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "numbers.h"
#include "tables.h"

namespace {

using flatkern::GramCotangents;
using flatkern::GramStatsOut;
using flatkern::Matrices;
using flatkern::cpu::Kernels;

using numbers::count;
using numbers::gaussians;
using numbers::Wide;

// As many as `wanted`; on the host CUDA kernels take more than a block of those that share one, and few
// others.
int samples([[maybe_unused]] int c, int wanted) {
#ifdef FLATKERN_EMULATED_CUDA
  return c <= 4 ? 35 : c <= 16 ? wanted : 6;
#else
  return wanted;
#endif
}

template <typename T>
Wide plain_gram(const T* x, int c, int d) {
  Wide g(count(c, c));
  for (int i = 0; i < c; ++i) {
    for (int j = 0; j < c; ++j) {
      for (int k = 0; k < d; ++k)
        g[count(i, c) + count(j)] += static_cast<long double>(x[i * d + k]) * x[j * d + k];
    }
  }
  return g;
}

// Gauss-Jordan of a symmetric positive definite matrix: its log-determinant, and the inverse in place.
long double plain_inverse(Wide& a, int c) {
  long double sum = 0;
  for (int k = 0; k < c; ++k) {
    const long double pivot = a[count(k, c) + count(k)];
    sum += std::log(pivot);
    a[count(k, c) + count(k)] = 1;
    for (int j = 0; j < c; ++j) a[count(k, c) + count(j)] /= pivot;
    for (int i = 0; i < c; ++i) {
      if (i == k) continue;
      const long double f = a[count(i, c) + count(k)];
      a[count(i, c) + count(k)] = 0;
      for (int j = 0; j < c; ++j) a[count(i, c) + count(j)] -= f * a[count(k, c) + count(j)];
    }
  }
  return sum;
}

template <typename T>
Matrices<T> contiguous(const std::vector<T>& x, std::int64_t n, int rows, int cols) {
  Matrices<T> m;
  m.data = x.data();
  m.batch.push(n, static_cast<std::int64_t>(rows) * cols);
  m.rows = rows, m.cols = cols, m.row_stride = cols, m.col_stride = 1;
  return m;
}

struct Stats {
  std::vector<double> logdet, trace, frobenius_sq, ratio, gram, inverse;
  std::unique_ptr<bool[]> deficient;
  std::vector<std::int64_t> bad;

  Stats(std::int64_t n, int c)
      : logdet(count(n)),
        trace(count(n)),
        frobenius_sq(count(n)),
        ratio(count(n)),
        gram(count(n, c, c)),
        inverse(count(n, c, c)),
        deficient(new bool[count(n)]),
        bad(count(n)) {}

  GramStatsOut out(bool factors) {
    return {logdet.data(),
            trace.data(),
            frobenius_sq.data(),
            deficient.get(),
            ratio.data(),
            bad.data(),
            factors ? gram.data() : nullptr,
            factors ? inverse.data() : nullptr};
  }
};

template <typename T>
void compare_with_plain_loops(const Kernels& kernels, int c, double tolerance) {
  const int d = 2 * c + 3, n = samples(c, 19);
  const std::vector<double> normals = gaussians(count(n, c, d), 7);
  const std::vector<T> x(normals.begin(), normals.end());
  const Matrices<T> m = contiguous(x, n, c, d);
  Stats lean(n, c), full(n, c);
  // in two ranges, as two threads would
  kernels.of(T{}).gram_stats(m, 0, 5, lean.out(false));
  kernels.of(T{}).gram_stats(m, 5, n, lean.out(false));
  kernels.of(T{}).gram_stats(m, 0, n, full.out(true));
  std::vector<double> grams(count(n, c, c));
  kernels.of(T{}).gram(m, 0, n, grams.data());
  const std::vector<T> matrices(grams.begin(), grams.end());
  const Matrices<T> g = contiguous(matrices, n, c, c);
  std::vector<T> spd(count(n)), weights(count(n)), inverse(matrices.size());
  for (int s = 0; s < n; ++s) weights[count(s)] = static_cast<T>(s - 2);
  kernels.of(T{}).spd_logdet(g, 0, n, spd.data());
  kernels.of(T{}).spd_pullback(g, weights.data(), 0, n, inverse.data());
  const std::vector<double> by_logdet = gaussians(count(n), 1), by_trace = gaussians(count(n), 2),
                            by_frobenius = gaussians(count(n), 3);
  std::vector<T> pulled(x.size());
  kernels.of(T{}).gram_pullback(m,
                                GramCotangents{by_logdet.data(), by_trace.data(), by_frobenius.data(),
                                               full.gram.data(), full.inverse.data()},
                                0, n, pulled.data());
  for (int s = 0; s < n; ++s) {
    const Wide plain = plain_gram(x.data() + count(s, c, d), c, d);
    Wide inverted = plain;
    const double expected = static_cast<double>(plain_inverse(inverted, c));
    long double t = 0, f = 0, largest = 0;
    for (int i = 0; i < c; ++i) t += plain[count(i, c) + count(i)];
    for (const long double v : plain) f += v * v;
    for (const long double v : inverted) largest = std::fmax(largest, std::fabs(v));
    const std::size_t at = count(s), first = count(s, c, c);
    for (std::size_t e = 0; e < count(c, c); ++e) {
      EXPECT_NEAR(grams[first + e], static_cast<double>(plain[e]), 1e-11 * d);
      EXPECT(full.gram[first + e] == grams[first + e]);
      const double scale = static_cast<double>(largest);
      EXPECT_NEAR(full.inverse[first + e], static_cast<double>(inverted[e]), 1e-11 * scale);
      EXPECT_NEAR(static_cast<double>(inverse[first + e]), (s - 2) * static_cast<double>(inverted[e]),
                  (s + 1) * 20 * tolerance * scale);
    }
    EXPECT_NEAR(lean.logdet[at], expected, 1e-11 * c);
    EXPECT_NEAR(lean.trace[at] / static_cast<double>(t), 1, 1e-13);
    EXPECT_NEAR(lean.frobenius_sq[at] / static_cast<double>(f), 1, 1e-13);
    EXPECT(!lean.deficient[at] && lean.bad[at] == 0);
    EXPECT(lean.ratio[at] > 0 && lean.ratio[at] <= 1);
    EXPECT(full.logdet[at] == lean.logdet[at] && full.ratio[at] == lean.ratio[at]);
    EXPECT_NEAR(static_cast<double>(spd[at]), expected, tolerance * (1 + std::abs(expected)));
    for (int i = 0; i < c; ++i) {
      for (int k = 0; k < d; ++k) {
        long double sum =
            2 * by_trace[at] * static_cast<long double>(x[count(s, c, d) + count(i, d) + count(k)]);
        for (int j = 0; j < c; ++j) {
          const std::size_t e = count(i, c) + count(j);
          sum += (4 * by_frobenius[at] * plain[e] + 2 * by_logdet[at] * inverted[e]) *
                 static_cast<long double>(x[count(s, c, d) + count(j, d) + count(k)]);
        }
        const double got = static_cast<double>(pulled[count(s, c, d) + count(i, d) + count(k)]);
        EXPECT_NEAR(got, static_cast<double>(sum), tolerance * (1 + std::fabs(static_cast<double>(sum))));
      }
    }
  }
}

// Diagonal rows with known singular values, turned by rotations on both sides, or left orthogonal; the least
// one may be tiny.
std::vector<double> rows_of(const std::vector<double>& values, int d, unsigned seed, bool orthogonal) {
  const int c = static_cast<int>(values.size());
  std::vector<double> x(count(c, d));
  for (int i = 0; i < c; ++i) x[count(i, d) + count(i)] = values[count(i)];
  const std::vector<double> angles = gaussians(count(c + d), seed);
  for (int i = 1; i < d; ++i) {
    const double co = std::cos(angles[count(i)]), si = std::sin(angles[count(i)]);
    for (int r = 0; r < c; ++r) {
      double& a = x[count(r, d) + count(i - 1)];
      double& b = x[count(r, d) + count(i)];
      const double turned = co * a - si * b;
      b = si * a + co * b;
      a = turned;
    }
  }
  for (int i = 1; i < c && !orthogonal; ++i) {
    const double co = std::cos(angles[count(d + i)]), si = std::sin(angles[count(d + i)]);
    for (int k = 0; k < d; ++k) {
      double& a = x[count(i - 1, d) + count(k)];
      double& b = x[count(i, d) + count(k)];
      const double turned = co * a - si * b;
      b = si * a + co * b;
      a = turned;
    }
  }
  return x;
}

void spectra_and_lost_digits(const Kernels& kernels, int c) {
  const int d = c + 5, n = samples(c, 11);
  std::vector<double> all;
  std::vector<std::vector<double>> spectra;
  for (int s = 0; s < n; ++s) {
    std::vector<double> values(count(c));
    for (int i = 0; i < c; ++i) values[count(i)] = std::pow(2.0, -i % 7) * (1 + 0.1 * s);
    // lost in the Gram matrix, as its pivots say; or as only its eigenvalues do, since the rows are
    // orthogonal
    if (s % 3 == 1) values[count(c - 1)] = 1e-9;
    if (s % 3 == 2) values[count(c - 1)] = 1e-7;
    const std::vector<double> x = rows_of(values, d, static_cast<unsigned>(s), s % 3 == 2);
    all.insert(all.end(), x.begin(), x.end());
    std::sort(values.begin(), values.end(), [](double a, double b) { return a > b; });
    spectra.push_back(values);
  }
  const Matrices<double> m = contiguous(all, n, c, d);
  std::vector<double> values(count(n, c)), alone(count(n, c)), vectors(count(n, c, c));
  kernels.f64.gram_spectrum(m, flatkern::cpu::kGramFloor, 0, n, alone.data(), nullptr);
  kernels.f64.gram_spectrum(m, flatkern::cpu::kGramFloor, 0, n, values.data(), vectors.data());
  Stats stats(n, c);
  kernels.f64.gram_stats(m, 0, n, stats.out(true));
  const std::unique_ptr<bool[]> wanted(new bool[count(n)]);
  for (int s = 0; s < n; ++s) wanted[count(s)] = s % 2 == 0;
  std::vector<double> factors(count(n, c, c));
  kernels.f64.lq(m, wanted.get(), 0, n, factors.data());
  for (int s = 0; s < n; ++s) {
    double logdet = 0;
    for (int i = 0; i < c; ++i) {
      const double expected = spectra[count(s)][count(i)];
      EXPECT_NEAR(values[count(s, c) + count(i)], expected, 2e-15 * c + 1e-6 * expected);
      EXPECT_NEAR(alone[count(s, c) + count(i)], expected, 2e-15 * c + 1e-6 * expected);
      EXPECT_NEAR(values[count(s, c)], spectra[count(s)][0], 1e-14 * c);
      logdet += 2 * std::log(expected);
      const double* u = vectors.data() + count(s, c, c) + count(i, c);
      for (int j = 0; j <= i; ++j) {  // the vectors are orthonormal, and those of these values
        const double* v = vectors.data() + count(s, c, c) + count(j, c);
        double inner = 0, through = 0;
        for (int k = 0; k < c; ++k) inner += u[k] * v[k];
        for (int k = 0; k < d; ++k) {
          double left = 0, right = 0;
          for (int r = 0; r < c; ++r) {
            left += u[r] * all[count(s, c, d) + count(r, d) + count(k)];
            right += v[r] * all[count(s, c, d) + count(r, d) + count(k)];
          }
          through += left * right;
        }
        EXPECT_NEAR(inner, i == j ? 1 : 0, 1e-13 * c);
        EXPECT_NEAR(through, i == j ? expected * expected : 0, 1e-13 * c);
      }
    }
    EXPECT_NEAR(stats.logdet[count(s)], logdet, s % 3 == 1 ? 1e-4 : 1e-9);
    EXPECT(stats.bad[count(s)] == 0 && !stats.deficient[count(s)]);
    const Wide gram = plain_gram(all.data() + count(s, c, d), c, d);
    for (int i = 0; i < c; ++i) {
      for (int j = 0; j < c; ++j) {
        double sum = 0;
        for (int k = 0; k < c; ++k) {
          sum += factors[count(s, c, c) + count(i, c) + count(k)] *
                 factors[count(s, c, c) + count(j, c) + count(k)];
        }
        const double expected = wanted[count(s)] ? static_cast<double>(gram[count(i, c) + count(j)]) : 0;
        EXPECT_NEAR(sum, expected, 1e-13 * c);
      }
    }
  }
}

void edges(const Kernels& kernels, int c) {
  std::vector<double> g(count(2, c, c));
  g[count(c, c) + count(c - 1, c)] = std::nan("");
  double logdet[2];
  const double weights[2] = {0, 1};
  std::vector<double> inverse(g.size(), 1.0);
  kernels.f64.spd_logdet(contiguous(g, 2, c, c), 0, 2, logdet);
  kernels.f64.spd_pullback(contiguous(g, 2, c, c), weights, 0, 2, inverse.data());
  EXPECT(logdet[0] == -INFINITY && std::isnan(logdet[1]));
  for (std::size_t e = 0; e < count(c, c); ++e) {  // a weight of zero asks for nothing
    EXPECT(inverse[e] == 0);
    EXPECT(std::isnan(inverse[count(c, c) + e]));
  }
  // dependent rows, all zeros, not finite; and every other column of a wider array, backwards
  const int d = c + 2;
  std::vector<double> wide = gaussians(count(3, c, 2 * d), 5);
  for (int k = 0; k < 2 * d; ++k) {
    wide[count(c - 1, 2 * d) + count(k)] = c == 1 ? 0 : 3 * wide[count(k)];
    for (int i = 0; i < c; ++i) wide[count(c + i, 2 * d) + count(k)] = 0;
  }
  wide[count(2 * c, 2 * d) + 1] = INFINITY;
  Matrices<double> m = contiguous(wide, 3, c, d);
  m.batch = {};
  m.batch.push(3, 2 * c * d);
  m.data = wide.data() + (2 * d - 1);
  m.row_stride = 2 * d, m.col_stride = -2;
  Stats stats(3, c);
  kernels.f64.gram_stats(m, 0, 3, stats.out(true));
  std::vector<double> values(count(3, c)), vectors(count(3, c, c));
  kernels.f64.gram_spectrum(m, flatkern::cpu::kGramFloor, 0, 3, values.data(), vectors.data());
  EXPECT(stats.deficient[0] && stats.bad[0] == 1 && stats.logdet[0] == -INFINITY);
  EXPECT(stats.deficient[1] && stats.bad[1] == c && stats.ratio[1] == 0);
  EXPECT(std::isnan(stats.logdet[2]) && !stats.deficient[2] && stats.bad[2] == 0);
  EXPECT(std::fabs(stats.ratio[0]) < 1e-28);
  EXPECT_NEAR(values[count(c - 1)], 0, 1e-14 * (1 + values[0]));
  for (int i = 0; i < c; ++i) {
    EXPECT(values[count(c + i)] == 0);
    EXPECT(std::isnan(values[count(2 * c + i)]));
  }
  Stats tall(3, c);  // more rows than columns
  Matrices<double> narrow = m;
  narrow.cols = c - 1;
  kernels.f64.gram_stats(narrow, 0, 3, tall.out(false));
  EXPECT(tall.deficient[0] && tall.bad[0] >= 1 && tall.logdet[0] == -INFINITY);
}

// |sum_t g_kt a_t^T|^2 in both forms, of rows that are contiguous along the features and along the positions.
template <typename T>
void ghost_norms(const Kernels& kernels, int positions, int d_in, int d_out, double tolerance) {
  const int cotangents = 2, samples = 2;
  const std::vector<double> wide_a = gaussians(count(samples, positions, d_in), 6);
  const std::vector<double> wide_g = gaussians(count(cotangents * samples, positions, d_out), 7);
  const std::vector<T> a(wide_a.begin(), wide_a.end()), g(wide_g.begin(), wide_g.end());
  for (const bool turned : {false, true}) {
    flatkern::GhostInput<T> x;
    x.positions = positions, x.d_in = d_in, x.d_out = d_out, x.cotangents = cotangents;
    x.cotangent_stride = samples * positions * d_out;
    const auto fill = [&](flatkern::GhostOperand<T>& to, const std::vector<T>& from, int width) {
      to.data = from.data();
      to.samples.push(samples, positions * width);
      to.positions.push(positions, turned ? 1 : width);
      to.features.push(width, turned ? positions : 1);
    };
    fill(x.a, a, d_in);
    fill(x.g, g, d_out);
    for (const bool formed : {false, true}) {
      std::vector<double> out(count(cotangents, samples), -1);
      kernels.of(T{}).ghost_norm(x, formed, 0, 1, out.data());
      kernels.of(T{}).ghost_norm(x, formed, 1, samples, out.data());
      for (int k = 0; k < cotangents; ++k) {
        for (int i = 0; i < samples; ++i) {
          long double sum = 0;
          for (int o = 0; o < d_out; ++o) {
            for (int d = 0; d < d_in; ++d) {
              long double entry = 0;
              for (int t = 0; t < positions; ++t) {
                entry +=
                    static_cast<long double>(
                        x.a.data[x.a.samples.offset(i) + x.a.positions.offset(t) + x.a.features.offset(d)]) *
                    x.g.data[k * x.cotangent_stride + x.g.samples.offset(i) + x.g.positions.offset(t) +
                             x.g.features.offset(o)];
              }
              sum += entry * entry;
            }
          }
          EXPECT_NEAR(out[count(k, samples) + count(i)], static_cast<double>(sum),
                      tolerance * (1 + static_cast<double>(sum)));
        }
      }
    }
  }
}

}  // namespace

int main() {
#ifdef FLATKERN_EMULATED_CUDA  // of every size class; the block forms begin past 32 rows
  const std::vector<int> sizes = {1, 2, 4, 5, 8, 9, 16, 17, 31, 32, 33, 47, 64};
#else
  const std::vector<int> sizes = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 31, 33};
#endif
  for (const char* table : tables::kNames) {
    const Kernels* kernels = tables::named(table);
    if (!kernels) continue;
    for (const int c : sizes) {
      const std::string name = std::string(table) + ", c = " + std::to_string(c);
      check::context = name.c_str();
      compare_with_plain_loops<float>(*kernels, c, 1e-4);
      compare_with_plain_loops<double>(*kernels, c, 1e-11);
      spectra_and_lost_digits(*kernels, c);
      edges(*kernels, c);
    }
    for (const int positions : {1, 17, 200}) {
      const std::string name = std::string(table) + ", T = " + std::to_string(positions);
      check::context = name.c_str();
      ghost_norms<float>(*kernels, positions, 35, 26, 1e-4);
      ghost_norms<double>(*kernels, positions, 130, 3, 1e-11);
    }
  }
  return check::result("kernels of matrices");
}
