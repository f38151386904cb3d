// Attention's loops over tiles as the CUDA kernels run them (csrc/common/attention_passes.h), a thread after
// the other, in double against formulas over whole rows, whose derivatives are those of the weights one by
// one; and those formulas against difference quotients. 0 on success.
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "common/attention_runs.h"

namespace {

using flatkern::Attention;
using Numbers = std::vector<double>;

enum class Mask { none, causal, boolean, full, row, column };

std::mt19937_64 generator(0);

Numbers random(std::int64_t n) {
  std::normal_distribution<double> normal;
  Numbers out(static_cast<std::size_t>(n));
  for (double& x : out) x = normal(generator);
  return out;
}

// What a case consists of: point, direction and cotangents.
struct Case {
  std::int64_t batch, queries, keys;
  int width, value_width;
  Mask mask;
  Numbers q, k, v, additive, g, dq, dk, dv, dmask, dg;
  std::unique_ptr<bool[]> allowed;

  std::int64_t mask_rows() const { return mask == Mask::row || mask == Mask::none ? 1 : queries; }
  std::int64_t mask_cols() const { return mask == Mask::column || mask == Mask::none ? 1 : keys; }

  Case(std::int64_t b, std::int64_t n, std::int64_t m, int d, int e, Mask kind)
      : batch(b), queries(n), keys(m), width(d), value_width(e), mask(kind) {
    q = random(b * n * d), k = random(b * m * d), v = random(b * m * e);
    dq = random(b * n * d), dk = random(b * m * d), dv = random(b * m * e);
    g = random(b * n * e), dg = random(b * n * e);
    if (mask == Mask::full || mask == Mask::row || mask == Mask::column) {
      additive = random(2 * mask_rows() * mask_cols()), dmask = random(2 * mask_rows() * mask_cols());
    }
    if (mask == Mask::boolean) {
      allowed.reset(new bool[static_cast<std::size_t>(2 * n * m)]);
      for (std::int64_t i = 0; i < 2 * n * m; ++i) allowed[static_cast<std::size_t>(i)] = generator() % 3 > 0;
      for (std::int64_t j = 0; j < m; ++j)
        allowed[static_cast<std::size_t>(j)] = false;  // a row without keys
    }
  }

  // Entry b of the batch has mask b % 2.
  Attention<double> arguments() const {
    const auto pointer = [](const Numbers& x) { return x.empty() ? nullptr : x.data(); };
    Attention<double> a;
    a.batch = batch, a.queries = queries, a.keys = keys, a.width = width, a.value_width = value_width;
    a.scale = 0.4, a.causal = mask == Mask::causal;
    a.q = q.data(), a.k = k.data(), a.v = v.data();
    a.additive = pointer(additive), a.allowed = allowed.get();
    if (a.additive || a.allowed) {
      a.masks = 2, a.mask_rows = mask_rows(), a.mask_cols = mask_cols();
      a.places.push(batch / 2, 0);
      a.places.push(2, 1);
    }
    a.g = g.data(), a.dg = pointer(dg);
    a.dq = pointer(dq), a.dk = pointer(dk), a.dv = pointer(dv), a.dmask = pointer(dmask);
    return a;
  }

  bool sees(std::int64_t b, std::int64_t i, std::int64_t j) const {
    if (mask == Mask::causal) return j <= i;
    return mask != Mask::boolean || allowed[static_cast<std::size_t>((b % 2 * queries + i) * keys + j)];
  }
  std::size_t mask_place(std::int64_t b, std::int64_t i, std::int64_t j) const {
    const std::int64_t row = mask == Mask::row ? 0 : i, col = mask == Mask::column ? 0 : j;
    return static_cast<std::size_t>((b % 2 * mask_rows() + row) * mask_cols() + col);
  }
};

double product(const Numbers& x, std::int64_t row, const Numbers& y, std::int64_t other, int width) {
  double sum = 0;
  for (int c = 0; c < width && !x.empty() && !y.empty(); ++c) {
    sum += x[static_cast<std::size_t>(row * width + c)] * y[static_cast<std::size_t>(other * width + c)];
  }
  return sum;
}

void add_row(Numbers& to, std::int64_t row, double factor, const Numbers& from, std::int64_t other,
             int width) {
  for (int c = 0; c < width && !from.empty(); ++c) {
    to[static_cast<std::size_t>(row * width + c)] +=
        factor * from[static_cast<std::size_t>(other * width + c)];
  }
}

// The same by whole rows of weights, and the softmax's derivatives without any of the loops' rearrangements.
struct Naive {
  Numbers out, image, q, k, v, mask, q2, k2, v2, mask2;

  explicit Naive(const Case& c)
      : out(c.g.size()),
        image(c.g.size()),
        q(c.q.size()),
        k(c.k.size()),
        v(c.v.size()),
        mask(c.additive.size()),
        q2(q),
        k2(k),
        v2(v),
        mask2(mask) {
    const auto n = static_cast<std::size_t>(c.keys);
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t i = 0; i < c.queries; ++i) {
        const std::int64_t row = b * c.queries + i;
        Numbers p(n), s_dot(n), p_dot(n), h(n), h_dot(n);
        double total = 0, mean = 0;
        for (std::int64_t j = 0; j < c.keys; ++j) {
          const auto at = static_cast<std::size_t>(j);
          const std::int64_t key = b * c.keys + j;
          const double m = c.additive.empty() ? 0 : c.additive[c.mask_place(b, i, j)];
          const double dm = c.dmask.empty() ? 0 : c.dmask[c.mask_place(b, i, j)];
          p[at] = c.sees(b, i, j) ? std::exp(0.4 * product(c.q, row, c.k, key, c.width) + m) : 0;
          s_dot[at] =
              0.4 * (product(c.dq, row, c.k, key, c.width) + product(c.q, row, c.dk, key, c.width)) + dm;
          h[at] = product(c.g, row, c.v, key, c.value_width);
          h_dot[at] =
              product(c.g, row, c.dv, key, c.value_width) + product(c.dg, row, c.v, key, c.value_width);
          total += p[at];
        }
        for (std::size_t j = 0; j < n; ++j) {
          p[j] = total > 0 ? p[j] / total : 0;
          mean += p[j] * s_dot[j];
        }
        double e = 0, e_dot = 0;
        for (std::size_t j = 0; j < n; ++j) {
          p_dot[j] = p[j] * (s_dot[j] - mean);
          e += p[j] * h[j];
          e_dot += p_dot[j] * h[j] + p[j] * h_dot[j];
        }
        for (std::int64_t j = 0; j < c.keys; ++j) {
          const auto at = static_cast<std::size_t>(j);
          const std::int64_t key = b * c.keys + j;
          const double ds = p[at] * (h[at] - e),
                       ds_dot = p_dot[at] * (h[at] - e) + p[at] * (h_dot[at] - e_dot);
          add_row(out, row, p[at], c.v, key, c.value_width);
          add_row(image, row, p_dot[at], c.v, key, c.value_width);
          add_row(image, row, p[at], c.dv, key, c.value_width);
          add_row(q, row, 0.4 * ds, c.k, key, c.width);
          add_row(k, key, 0.4 * ds, c.q, row, c.width);
          add_row(v, key, p[at], c.g, row, c.value_width);
          add_row(q2, row, 0.4 * ds_dot, c.k, key, c.width);
          add_row(q2, row, 0.4 * ds, c.dk, key, c.width);
          add_row(k2, key, 0.4 * ds_dot, c.q, row, c.width);
          add_row(k2, key, 0.4 * ds, c.dq, row, c.width);
          add_row(v2, key, p_dot[at], c.g, row, c.value_width);
          add_row(v2, key, p[at], c.dg, row, c.value_width);
          if (!mask.empty()) mask[c.mask_place(b, i, j)] += ds, mask2[c.mask_place(b, i, j)] += ds_dot;
        }
      }
    }
  }
};

void same(const Numbers& got, const Numbers& expected, const char* what) {
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    worst = std::fmax(worst, std::isfinite(got[i]) ? std::fabs(got[i] - expected[i]) : 1e300);
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  check::expect_near(worst, 0, 1e-12 * std::fmax(1, largest), what, __FILE__, __LINE__);
}

Numbers row_dots(const Numbers& x, const Numbers& y, int width) {
  Numbers out;
  for (std::size_t r = 0; r < x.size() / static_cast<std::size_t>(width); ++r) {
    const auto row = static_cast<std::int64_t>(r);
    out.push_back(product(x, row, y, row, width));
  }
  return out;
}

// Threads in either order, with the very same results: no phase reads what it writes.
template <typename Pass>
void run(const Pass& pass, std::initializer_list<Numbers*> results) {
  flatkern::attention::on_host(pass, true);
  std::vector<Numbers> before;
  for (const Numbers* result : results) before.push_back(*result);
  flatkern::attention::on_host(pass);
  std::size_t k = 0;
  for (const Numbers* result : results) EXPECT(*result == before[k++]);
}

template <bool twice>
void check_sums(const Case& c, const Attention<double>& a, const Naive& expected) {
  using namespace flatkern::attention;
  const double nan = std::nan("");
  Numbers q(c.q.size(), nan), k(c.k.size(), nan), v(c.v.size(), nan), mask(c.additive.size(), nan);
  run(QuerySums<double, twice>{a, q.data()}, {&q});
  run(KeySums<double, twice>{a, k.data(), v.data()}, {&k, &v});
  if (!mask.empty()) run(MaskSums<double, twice>{a, mask.data()}, {&mask});
  same(q, twice ? expected.q2 : expected.q, "the gradient in the queries");
  same(k, twice ? expected.k2 : expected.k, "the gradient in the keys");
  same(v, twice ? expected.v2 : expected.v, "the gradient in the values");
  same(mask, twice ? expected.mask2 : expected.mask, "the gradient in the mask");
  Numbers k_alone(c.k.size(), nan), v_alone(c.v.size(), nan);
  on_host(KeySums<double, twice>{a, k_alone.data(), nullptr});
  on_host(KeySums<double, twice>{a, nullptr, v_alone.data()});
  same(k_alone, k, "the keys alone");
  same(v_alone, v, "the values alone");
}

void check_case(const Case& c) {
  using namespace flatkern::attention;
  const Naive expected(c);
  Attention<double> a = c.arguments();
  const auto rows = static_cast<std::size_t>(c.batch * c.queries);
  const double nan = std::nan("");
  Numbers out(c.g.size(), nan), stats(2 * rows, nan), image(c.g.size(), nan), mean(rows, nan);
  run(Forward<double>{a, out.data(), stats.data()}, {&out, &stats});
  same(out, expected.out, "the value");
  a.stats = stats.data();
  run(Tangent<double>{a, out.data(), image.data(), mean.data()}, {&image, &mean});
  same(image, expected.image, "the tangent");
  const Numbers total = row_dots(c.g, out, c.value_width);
  a.total = total.data();
  check_sums<false>(c, a, expected);
  Numbers change = row_dots(c.g, image, c.value_width);
  const Numbers more = c.dg.empty() ? Numbers(rows) : row_dots(c.dg, out, c.value_width);
  for (std::size_t r = 0; r < rows; ++r) change[r] += more[r];
  a.mean = mean.data(), a.change = change.data();
  check_sums<true>(c, a, expected);
}

// The formulas above are derivatives: difference quotients of the value and of the gradient.
void check_formulas(Mask mask) {
  const double step = 1e-5;
  Case c(2, 3, 4, 2, 3, mask), forward(c.batch, 3, 4, 2, 3, mask), backward(c.batch, 3, 4, 2, 3, mask);
  const auto move = [&](Case& to, double h) {
    const auto moved = [&](const Numbers& x, const Numbers& dx) {
      Numbers y = x;
      for (std::size_t i = 0; i < x.size(); ++i) y[i] += h * dx[i];
      return y;
    };
    to.q = moved(c.q, c.dq), to.k = moved(c.k, c.dk), to.v = moved(c.v, c.dv), to.g = moved(c.g, c.dg);
    to.additive = moved(c.additive, c.dmask);
    for (std::size_t i = 0; c.allowed && i < static_cast<std::size_t>(2 * 3 * 4); ++i) {
      to.allowed[i] = c.allowed[i];
    }
  };
  move(forward, step), move(backward, -step);
  const Naive here(c), after(forward), before(backward);
  const auto quotient = [&](const Numbers& up, const Numbers& down, const Numbers& expected) {
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR((up[i] - down[i]) / (2 * step), expected[i], 1e-7);
    }
  };
  quotient(after.out, before.out, here.image);
  quotient(after.q, before.q, here.q2);
  quotient(after.k, before.k, here.k2);
  quotient(after.v, before.v, here.v2);
  quotient(after.mask, before.mask, here.mask2);
  // <g, O.> at a fixed g is the gradient along the direction
  double along = 0, pulled = 0;
  for (std::size_t i = 0; i < c.g.size(); ++i) along += c.g[i] * here.image[i];
  for (std::size_t i = 0; i < c.q.size(); ++i) pulled += here.q[i] * c.dq[i];
  for (std::size_t i = 0; i < c.k.size(); ++i) pulled += here.k[i] * c.dk[i];
  for (std::size_t i = 0; i < c.v.size(); ++i) pulled += here.v[i] * c.dv[i];
  for (std::size_t i = 0; i < c.additive.size(); ++i) pulled += here.mask[i] * c.dmask[i];
  EXPECT_NEAR(pulled, along, 1e-12);
}

}  // namespace

int main() {
  for (const Mask mask : {Mask::none, Mask::causal, Mask::boolean, Mask::full, Mask::row, Mask::column}) {
    check_formulas(mask);
    check_case(Case(2, 5, 3, 2, 3, mask));
    check_case(Case(2, 70, 65, 8, 5, mask));
  }
  check_case(Case(2, 30, 130, 6, 8, Mask::causal));
  check_case(Case(2, 130, 40, 128, 127, Mask::causal));
  check_case(Case(4, 64, 64, 65, 128, Mask::full));
  // tangents that are not there
  Case c(2, 66, 67, 9, 10, Mask::full);
  c.dq.clear();
  check_case(c);
  c.dk.clear(), c.dmask.clear();
  check_case(c);
  c.dg.clear();
  check_case(c);
  Case only_mask(2, 66, 67, 9, 10, Mask::row);
  only_mask.dq.clear(), only_mask.dk.clear(), only_mask.dv.clear(), only_mask.dg.clear();
  check_case(only_mask);
  return check::result("test_attention");
}
