// Rows of random numbers, dots and Lanczos steps chunk by chunk, for both doors. `parallel(n, grain, f)` runs
// f(begin, end) over ranges of [0, n). Chunks are fixed, so results depend on no number of threads.
#pragma once

#include <cmath>
#include <vector>

#include "kernels.h"

namespace flatkern::cpu {

struct Chunks {
  std::int64_t size, per_row;

  explicit Chunks(std::int64_t size_) : size(size_), per_row((size_ + kProbeChunk - 1) / kProbeChunk) {}

  // f(row, begin, end) for chunks [first, last) of all rows
  template <typename F>
  void each(std::int64_t first, std::int64_t last, const F& f) const {
    for (std::int64_t c = first; c < last; ++c) {
      const std::int64_t row = c / per_row, begin = (c - row * per_row) * kProbeChunk;
      f(row, begin, begin + kProbeChunk < size ? begin + kProbeChunk : size, c);
    }
  }
};

constexpr std::int64_t kChunkGrain = 4;  // some 100 us of work a thread

// Values [rows, size] of a generator, one of TypedProbeKernels' members.
template <typename T, typename Generate, typename Parallel>
void random_rows(Generate generate, std::uint64_t seed, std::uint64_t first, std::int64_t rows,
                 std::int64_t size, T* out, const Parallel& parallel) {
  const Chunks chunks(size);
  parallel(rows * chunks.per_row, kChunkGrain, [&](std::int64_t from, std::int64_t to) {
    chunks.each(from, to, [&](std::int64_t row, std::int64_t begin, std::int64_t end, std::int64_t) {
      generate(seed, first + static_cast<std::uint64_t>(row), begin, end, out + row * size + begin);
    });
  });
}

// Sums each row's chunks in order.
inline void join_chunks(const std::vector<double>& sums, std::int64_t per_row, std::int64_t rows,
                        double* out) {
  for (std::int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (std::int64_t c = 0; c < per_row; ++c) total += sums[static_cast<std::size_t>(r * per_row + c)];
    out[r] = total;
  }
}

// Dots of x [batch, rows, size] with the sign rows first, first + 1, ...
template <typename T, typename Parallel>
void rademacher_dots(std::uint64_t seed, std::uint64_t first, std::int64_t batch, std::int64_t rows,
                     std::int64_t size, const T* x, double* out, const Parallel& parallel) {
  const Chunks chunks(size);
  std::vector<double> sums(static_cast<std::size_t>(batch * rows * chunks.per_row));
  const auto dot = kernels().probes->of(T{}).rademacher_dot;
  parallel(static_cast<std::int64_t>(sums.size()), kChunkGrain, [&](std::int64_t from, std::int64_t to) {
    chunks.each(from, to, [&](std::int64_t line, std::int64_t begin, std::int64_t end, std::int64_t c) {
      const auto row = first + static_cast<std::uint64_t>(line % rows);
      sums[static_cast<std::size_t>(c)] = dot(seed, row, begin, end, x + line * size + begin);
    });
  });
  join_chunks(sums, chunks.per_row, batch * rows, out);
}

// Rows with unit strides inside them.
template <typename T>
struct Rows {
  T* data;
  std::int64_t stride;

  T* at(std::int64_t row, std::int64_t begin) const { return data + row * stride + begin; }
};

// alpha = <current, image>, residual = image - alpha current - beta previous, norm = |residual|, row by row.
template <typename T, typename Parallel>
void lanczos_step(std::int64_t rows, std::int64_t size, Rows<const T> image, Rows<const T> current,
                  Rows<const T> previous, const double* beta, Rows<T> residual, double* alpha, double* norm,
                  const Parallel& parallel) {
  const Chunks chunks(size);
  const auto& table = kernels().probes->of(T{});
  std::vector<double> sums(static_cast<std::size_t>(rows * chunks.per_row));
  const auto over_chunks = [&](const auto& f) {
    parallel(static_cast<std::int64_t>(sums.size()), kChunkGrain,
             [&](std::int64_t from, std::int64_t to) { chunks.each(from, to, f); });
  };
  over_chunks([&](std::int64_t row, std::int64_t begin, std::int64_t end, std::int64_t c) {
    sums[static_cast<std::size_t>(c)] = table.dot(end - begin, current.at(row, begin), image.at(row, begin));
  });
  join_chunks(sums, chunks.per_row, rows, alpha);
  over_chunks([&](std::int64_t row, std::int64_t begin, std::int64_t end, std::int64_t c) {
    sums[static_cast<std::size_t>(c)] =
        table.three_term(end - begin, image.at(row, begin), current.at(row, begin), previous.at(row, begin),
                         alpha[row], beta[row], residual.at(row, begin));
  });
  join_chunks(sums, chunks.per_row, rows, norm);
  for (std::int64_t r = 0; r < rows; ++r) norm[r] = std::sqrt(norm[r]);
}

}  // namespace flatkern::cpu
