// Convolutions pulled back from scattered cotangents, of every instruction set that this processor has,
// against plain loops in long double.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "numbers.h"
#include "tables.h"

namespace {

using flatkern::cpu::Kernels;
using numbers::count;
using numbers::gaussians;
using numbers::Wide;

// Cotangents pulled back through a convolution from every other place or so, in two ranges of samples.
template <typename T>
void scattered(const Kernels& kernels, const flatkern::ScatteredConv& s, double tolerance) {
  const std::int64_t n = 3, taps = s.taps(), size = s.rows * s.cols;
  const auto narrow = [](const std::vector<double>& x) { return std::vector<T>(x.begin(), x.end()); };
  const std::vector<T> values = narrow(gaussians(count(n * s.cotangents, s.channels, s.entries), 1));
  const std::vector<T> input = narrow(gaussians(count(n, s.in_channels, size), 2));
  const std::vector<T> weight = narrow(gaussians(count(s.channels, taps, s.in_channels), 3));
  std::vector<std::int64_t> index(count(n, s.channels, s.entries));
  for (std::size_t e = 0; e < index.size(); ++e) {
    const std::int64_t p = static_cast<std::int64_t>(e) % s.entries,
                       at = 2 * p + static_cast<std::int64_t>(e / 3) % 2;
    index[e] = e % 5 == 4 ? -1 : at < s.places() ? at : s.places();  // the last is no place either
  }
  std::vector<T> out(count(n * s.cotangents, s.in_channels, size));
  std::vector<double> weight_sq(count(n)), bias_sq(count(n)), place_sq(count(n, s.places()));
  const auto& table = kernels.scattered(T{});
  std::vector<char> sums(static_cast<std::size_t>(table.bytes(s, true)));
  std::vector<char> image(static_cast<std::size_t>(table.bytes(s, false)));
  for (const std::int64_t begin : {0, 1}) {
    const std::int64_t end = begin ? n : 1;
    table.input(s, values.data(), index.data(), weight.data(), begin, end, sums.data(), out.data());
    table.norms(s, values.data(), index.data(), input.data(), begin, end, image.data(), weight_sq.data(),
                bias_sq.data(), place_sq.data());
  }
  for (std::int64_t i = 0; i < n; ++i) {
    Wide places(count(s.places()));
    long double of_weight = 0, of_bias = 0;
    for (std::int64_t k = 0; k < s.cotangents; ++k) {
      Wide rows(count(s.in_channels, size));
      for (std::int64_t c = 0; c < s.channels; ++c) {
        Wide gradient(count(s.in_channels, taps));
        long double bias = 0;
        for (std::int64_t p = 0; p < s.entries; ++p) {
          const std::int64_t at = index[count(i * s.channels + c, s.entries) + count(p)];
          if (at < 0 || at >= s.places()) continue;
          const long double v = values[count((i * s.cotangents + k) * s.channels + c, s.entries) + count(p)];
          bias += v;
          places[count(at)] += v * v;
          for (std::int64_t tap = 0; tap < taps; ++tap) {
            const std::int64_t y =
                at / s.out_cols * s.stride_rows - s.padding_rows + tap / s.kernel_cols * s.dilation_rows;
            const std::int64_t x =
                at % s.out_cols * s.stride_cols - s.padding_cols + tap % s.kernel_cols * s.dilation_cols;
            if (y < 0 || y >= s.rows || x < 0 || x >= s.cols) continue;
            for (std::int64_t ci = 0; ci < s.in_channels; ++ci) {
              const std::size_t place = count(ci, size) + count(y, s.cols) + count(x);
              rows[place] += v * weight[count(c * taps + tap, s.in_channels) + count(ci)];
              gradient[count(ci, taps) + count(tap)] += v * input[count(i, s.in_channels, size) + place];
            }
          }
        }
        of_bias += bias * bias;
        for (const long double g : gradient) of_weight += g * g;
      }
      for (std::size_t e = 0; e < rows.size(); ++e) {
        const double got = static_cast<double>(out[count(i * s.cotangents + k, s.in_channels, size) + e]);
        EXPECT_NEAR(got, static_cast<double>(rows[e]), 20 * tolerance);
      }
    }
    EXPECT_NEAR(weight_sq[count(i)], static_cast<double>(of_weight),
                tolerance * static_cast<double>(of_weight));
    EXPECT_NEAR(bias_sq[count(i)], static_cast<double>(of_bias),
                10 * tolerance * static_cast<double>(of_bias));
    for (std::size_t t = 0; t < places.size(); ++t) {
      EXPECT_NEAR(place_sq[count(i, s.places()) + t], static_cast<double>(places[t]),
                  tolerance * static_cast<double>(places[t]));
    }
  }
}

// k cotangents, channels, entries, input channels and plane, output plane, kernel, stride, padding, dilation
const flatkern::ScatteredConv kConvolutions[] = {
    {10, 4, 13, 3, 5, 4, 7, 6, 3, 3, 1, 1, 2, 2, 1, 1},
    {17, 3, 6, 13, 4, 3, 4, 3, 1, 1, 1, 1, 0, 0, 1, 1},
    {1, 2, 5, 2, 9, 8, 3, 4, 5, 2, 2, 2, 0, 0, 1, 1},
    {3, 5, 4, 1, 6, 7, 4, 2, 2, 4, 1, 3, 0, 3, 2, 2},
};

}  // namespace

int main() {
  for (const char* table : tables::kNames) {
    const Kernels* kernels = tables::named(table);
    if (!kernels) continue;
    for (const flatkern::ScatteredConv& s : kConvolutions) {
      const std::string name = std::string(table) + ", k = " + std::to_string(s.cotangents);
      check::context = name.c_str();
      scattered<float>(*kernels, s, 1e-5);
      scattered<double>(*kernels, s, 1e-13);
    }
  }
  return check::result("scattered convolutions");
}
