// Tests of what the CPU and the GPU share (csrc/common), without any framework: 0 on success.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "common/double_double.h"
#include "common/jacobi.h"
#include "common/matrices.h"
#include "common/philox.h"
#include "common/spd_math.h"

namespace {

void packed_rows_are_dense() {
  std::int64_t next = 0;
  for (std::int64_t i = 0; i < 129; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) EXPECT(flatkern::packed(i, j) == next++);
  }
  EXPECT(flatkern::packed(3'000'000'000, 0) > 0);  // no overflow of 32 bits
}

// The offset of every sample against nested loops, for shapes with expanded and negative strides.
void offsets_match_nested_loops() {
  const std::vector<std::vector<std::int64_t>> sizes = {{5}, {2, 3}, {4, 1, 3}, {2, 3, 4}, {1}, {}};
  const std::vector<std::vector<std::int64_t>> strides = {{7}, {100, 6}, {0, 9, 5}, {-40, 0, 3}, {12}, {}};
  for (std::size_t t = 0; t < sizes.size(); ++t) {
    flatkern::Batch batch;
    for (std::size_t k = 0; k < sizes[t].size(); ++k) EXPECT(batch.push(sizes[t][k], strides[t][k]));
    std::int64_t n = 1;
    for (std::int64_t s : sizes[t]) n *= s;
    EXPECT(batch.count() == n);
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t rest = i, offset = 0;
      for (std::size_t k = sizes[t].size(); k-- > 0;) {
        offset += rest % sizes[t][k] * strides[t][k];
        rest /= sizes[t][k];
      }
      EXPECT(batch.offset(i) == offset);
    }
  }
}

void contiguous_dimensions_merge() {
  flatkern::Batch batch;
  EXPECT(batch.push(4, 60) && batch.push(3, 20) && batch.push(1, 999) && batch.push(2, 10));
  EXPECT(batch.dims == 1 && batch.count() == 24 && batch.offset(23) == 230);
  flatkern::Batch wide;
  for (int k = 0; k < flatkern::kMaxBatchDims; ++k) EXPECT(wide.push(2, 1000 + 7 * k));
  EXPECT(!wide.push(2, 3));
  flatkern::Batch empty;
  EXPECT(empty.push(3, 4) && empty.push(0, 4) && empty.count() == 0);
}

template <typename T>
void pivots() {
  const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
  const T tolerance = flatkern::spd_tolerance<T>(10);
  EXPECT(tolerance == 10 * std::numeric_limits<T>::epsilon());
  EXPECT(flatkern::good_pivot(T(1), T(1), tolerance));
  EXPECT(!flatkern::good_pivot(T(0), T(1), tolerance));
  EXPECT(!flatkern::good_pivot(T(-1), T(1), tolerance));
  EXPECT(!flatkern::good_pivot(tolerance, T(1), tolerance));
  EXPECT(flatkern::good_pivot(T(2) * tolerance, T(1), tolerance));
  EXPECT(!flatkern::good_pivot(nan, T(1), tolerance));
  EXPECT(!flatkern::good_pivot(std::numeric_limits<T>::denorm_min(), T(0), tolerance));
  EXPECT(flatkern::is_finite(T(3)) && !flatkern::is_finite(nan) && !flatkern::is_finite(inf) &&
         !flatkern::is_finite(-inf));
  EXPECT(flatkern::Limits<T>::eps == std::numeric_limits<T>::epsilon());
  EXPECT(flatkern::Limits<T>::min_normal == std::numeric_limits<T>::min());
}

void gram_tolerances() {
  const double eps = std::numeric_limits<double>::epsilon();
  EXPECT(flatkern::lq_tolerance<double>(10) == 10 * 1048576 * eps * eps);
  EXPECT(flatkern::lq_tolerance<float>(10) == flatkern::gram_tolerance<float>(10, 64));
  EXPECT(flatkern::lost_digits<double>() > flatkern::gram_tolerance<double>(1024, 100000));
  EXPECT(flatkern::lost_digits<float>() > flatkern::gram_tolerance<float>(1024, 100000));
  EXPECT(flatkern::gram_tolerance<double>(10, 64) == 64 * std::numeric_limits<double>::epsilon());
  EXPECT(flatkern::gram_tolerance<double>(10, 4) == 10 * std::numeric_limits<double>::epsilon());
  const double input = std::pow(static_cast<double>(std::numeric_limits<float>::epsilon()), 2);
  EXPECT(flatkern::gram_tolerance<float>(10, 64) == 10 * input);
  EXPECT(flatkern::gram_tolerance<float>(1, 10000) == 10000 * std::numeric_limits<double>::epsilon());
}

// Random123's published vectors for philox4x32-10.
void philox_vectors() {
  const auto expect_words = [](std::uint64_t seed, std::uint64_t row, std::uint64_t block,
                               std::vector<std::uint32_t> words) {
    const flatkern::Random4 got = flatkern::philox(seed, row, block, flatkern::Stream::kSigns);
    for (int k = 0; k < 4; ++k) EXPECT(got.x[k] == words[k]);
  };
  const std::uint64_t ones = ~std::uint64_t{0};
  expect_words(0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  expect_words(ones, ones, ones, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  expect_words(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88,
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
  const flatkern::Random4 signs = flatkern::philox(0, 0, 0, flatkern::Stream::kSigns);
  const flatkern::Random4 normals = flatkern::philox(0, 0, 0, flatkern::Stream::kNormals);
  EXPECT(signs.x[0] != normals.x[0]);
  EXPECT(flatkern::sign_bit(signs, 0) == (0x6627e8d5u & 1u) &&
         flatkern::sign_bit(signs, 127) == 0x9b00dbd8u >> 31);
}

void normals_are_box_muller() {
  const double turn = 2 * std::acos(-1.0);
  for (std::uint64_t block = 0; block < 20000; ++block) {
    const flatkern::Random4 r = flatkern::philox(1, 2, block, flatkern::Stream::kNormals);
    float first, second;
    flatkern::normal_pair(r.x[0], r.x[1], &first, &second);
    const double radius = std::sqrt(-2 * std::log(r.x[0] / 4294967296.0));
    const double angle = ((r.x[1] >> 30) + ((r.x[1] & 0x3fffffffu) - 536870912.0) / 1073741824.0) * turn / 4;
    EXPECT(std::fabs(first - radius * std::cos(angle)) < 1e-4);
    EXPECT(std::fabs(second - radius * std::sin(angle)) < 1e-4);
  }
  EXPECT(std::fabs(flatkern::normal_radius(0) - std::sqrt(66 * std::log(2.0))) < 1e-5);
  EXPECT(flatkern::normal_radius(0xffffffffu) == 0);
  EXPECT(flatkern::nearest_float(0xffffffffu) == 4294967296.0f && flatkern::nearest_float(3) == 3);
}

// Twice the precision: sums that cancel, products, quotients; against exact values.
void double_doubles() {
  using flatkern::DoubleDouble;
  DoubleDouble sum = {0, 0};
  for (int k = 0; k < 1000; ++k) sum = flatkern::add_product(sum, 1 + 1e-9 * k, 1 - 1e-9 * k);
  sum = flatkern::add(sum, {-1000, 0});
  long double expected = 0;
  for (int k = 0; k < 1000; ++k) {
    const long double a = 1 + 1e-9 * k, b = 1 - 1e-9 * k;
    expected += (a - 1) + (b - 1) + (a - 1) * (b - 1);
  }
  EXPECT_NEAR(sum.hi, static_cast<double>(expected), 1e-24);
  const DoubleDouble third = flatkern::reciprocal({3, 0});
  const DoubleDouble one = flatkern::multiply(third, {3, 0});
  EXPECT(third.hi == 1.0 / 3.0 && std::fabs(third.lo) > 0);
  EXPECT(one.hi == 1 && std::fabs(one.lo) < 1e-31);
  const DoubleDouble back = flatkern::multiply(flatkern::reciprocal({1e200, 1e183}), {1e200, 1e183});
  EXPECT(back.hi == 1 && std::fabs(back.lo) < 1e-31);
  const DoubleDouble exact = flatkern::two_sum(1e16, 1);
  EXPECT(exact.hi == 1e16 && exact.lo == 1);
  const DoubleDouble nothing = flatkern::add({5, 1e-20}, flatkern::negate({5, 1e-20}));
  EXPECT(nothing.hi == 0 && nothing.lo == 0);
}

// Every pair of rows once, no row twice in a round.
void rounds_of_pairs() {
  for (int m = 2; m <= 64; m += 2) {
    std::vector<int> met(static_cast<std::size_t>(m * m));
    for (int r = 0; r < m - 1; ++r) {
      std::vector<int> seen(static_cast<std::size_t>(m));
      for (int p = 0; p < m / 2; ++p) {
        const flatkern::RowPair pair = flatkern::round_robin(m, r, p);
        EXPECT(0 <= pair.j && pair.j < pair.i && pair.i < m);
        ++met[static_cast<std::size_t>(pair.i * m + pair.j)];
        EXPECT(++seen[static_cast<std::size_t>(pair.i)] == 1 &&
               ++seen[static_cast<std::size_t>(pair.j)] == 1);
      }
    }
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < i; ++j) EXPECT(met[static_cast<std::size_t>(i * m + j)] == 1);
    }
  }
}

// Rotated rows are orthogonal, also where their lengths differ by twenty digits.
void rotations() {
  for (const double length : {1.0, 1e-20, 3e10}) {
    for (const double cosine : {0.5, -0.999, 1e-9}) {
      const double a[2] = {1, 0}, b[2] = {length * cosine, length * std::sqrt(1 - cosine * cosine)};
      const double ab = a[0] * b[0], bb = b[0] * b[0] + b[1] * b[1];
      const flatkern::Rotation by = flatkern::rotation_of(1, bb, ab, flatkern::jacobi_tolerance(2));
      EXPECT(by.turns);
      double p[2] = {a[0], a[1]}, q[2] = {b[0], b[1]};
      for (int k = 0; k < 2; ++k) by.apply(p[k], q[k]);
      const double co = 1 - by.si * by.tau;
      EXPECT_NEAR(co * co + by.si * by.si, 1, 1e-15);
      EXPECT_NEAR((p[0] * q[0] + p[1] * q[1]) / (std::hypot(p[0], p[1]) * std::hypot(q[0], q[1])), 0, 1e-12);
    }
  }
  EXPECT(!flatkern::rotation_of(0, 1, 0, flatkern::jacobi_tolerance(2)).turns);
  EXPECT(!flatkern::rotation_of(1, 1, 1e-17, flatkern::jacobi_tolerance(2)).turns);
}

}  // namespace

int main() {
  packed_rows_are_dense();
  offsets_match_nested_loops();
  contiguous_dimensions_merge();
  pivots<float>();
  pivots<double>();
  gram_tolerances();
  philox_vectors();
  normals_are_box_muller();
  double_doubles();
  rounds_of_pairs();
  rotations();
  return check::result("shared mathematics");
}
