// Numbers for tests without a framework.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace numbers {

using Wide = std::vector<long double>;

inline std::size_t count(std::int64_t a, std::int64_t b = 1, std::int64_t c = 1) {
  return static_cast<std::size_t>(a * b * c);
}

inline std::vector<double> gaussians(std::size_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> out(n);
  for (double& v : out) v = normal(engine);
  return out;
}

template <typename T>
std::vector<T> normals(std::int64_t n, unsigned seed) {
  const std::vector<double> wide = gaussians(count(n), seed);
  return {wide.begin(), wide.end()};
}

}  // namespace numbers
