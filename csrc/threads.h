// Threads of the NumPy door.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace flatkern {

// Runs f on ranges of [0, n), on as many threads as have enough to do, without the interpreter lock.
template <typename F>
void spread(std::int64_t n, std::int64_t grain, int threads, const F& f) {
  const pybind11::gil_scoped_release release;
  const std::int64_t parts = std::min<std::int64_t>(std::max(threads, 1), (n + grain - 1) / grain);
  if (parts <= 1) {
    if (n > 0) f(std::int64_t{0}, n);
    return;
  }
  std::vector<std::thread> pool;
  for (std::int64_t p = 1; p < parts; ++p) pool.emplace_back(f, n * p / parts, n * (p + 1) / parts);
  f(std::int64_t{0}, n / parts);
  for (std::thread& t : pool) t.join();
}

}  // namespace flatkern
