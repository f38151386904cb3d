// Random rows and dots with them, and the three-term step of Lanczos. Instantiated once per instruction set
// by probes_*.cpp, without contraction to fused multiply-adds (philox.h says why).
#pragma once

#include "../common/philox.h"
#include "kernels.h"

#ifndef FLATKERN_ISA
#error "include this file through probes_*.cpp"
#endif

namespace flatkern::cpu::FLATKERN_ISA {

// Partial sums: enough of them for a vector unit, joined in a fixed order.
constexpr int kLanes = 16;

template <int n>
inline __attribute__((always_inline)) double joined(double (&sums)[n]) {
  for (int width = n / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// Calls f(first element of the run in the row, bits of the block, first bit, how many) block by block.
template <typename F>
inline __attribute__((always_inline)) void each_sign_block(std::uint64_t seed, std::uint64_t row,
                                                           std::int64_t begin, std::int64_t end, const F& f) {
  for (std::int64_t j = begin; j < end;) {
    const std::int64_t block = j / kSignsPerBlock;
    const int first = static_cast<int>(j - block * kSignsPerBlock);
    const std::int64_t left = end - j, room = kSignsPerBlock - first;
    const int count = static_cast<int>(left < room ? left : room);
    f(j, philox(seed, row, static_cast<std::uint64_t>(block), Stream::kSigns), first, count);
    j += count;
  }
}

template <typename T>
void rademacher(std::uint64_t seed, std::uint64_t row, std::int64_t begin, std::int64_t end, T* out) {
  each_sign_block(seed, row, begin, end, [&](std::int64_t j, const Random4& r, int first, int count) {
    T* to = out + (j - begin);
    if (count == kSignsPerBlock) {
      for (int w = 0; w < 4; ++w) {
        const std::uint32_t bits = r.x[w];
        for (int e = 0; e < 32; ++e) to[32 * w + e] = ((bits >> e) & 1u) ? T(-1) : T(1);
      }
      return;
    }
    for (int e = 0; e < count; ++e) to[e] = sign_bit(r, first + e) ? T(-1) : T(1);
  });
}

inline __attribute__((always_inline)) float flipped(float v, std::uint32_t bits) {
  return float_of_bits(bits_of_float(v) ^ (bits << 31));
}

inline __attribute__((always_inline)) double flipped(double v, std::uint32_t bits) {
  std::uint64_t word;
  __builtin_memcpy(&word, &v, sizeof word);
  word ^= static_cast<std::uint64_t>(bits) << 63;
  __builtin_memcpy(&v, &word, sizeof v);
  return v;
}

// One block of 128 products with their signs, summed in kLanes lanes.
template <typename T>
inline __attribute__((always_inline)) void add_signed(const T* x, const Random4& r, double (&sums)[kLanes]) {
  T signed_values[kSignsPerBlock];
  for (int w = 0; w < 4; ++w) {
    for (std::uint32_t e = 0; e < 32; ++e) {
      signed_values[32 * w + e] = flipped(x[32 * w + e], r.x[w] >> e);
    }
  }
  for (int part = 0; part < kSignsPerBlock; part += kLanes) {
    for (int e = 0; e < kLanes; ++e) sums[e] += static_cast<double>(signed_values[part + e]);
  }
}

template <typename T>
double rademacher_dot(std::uint64_t seed, std::uint64_t row, std::int64_t begin, std::int64_t end,
                      const T* x) {
  double sums[kLanes] = {};
  each_sign_block(seed, row, begin, end, [&](std::int64_t j, const Random4& r, int first, int count) {
    const T* from = x + (j - begin);
    if (count == kSignsPerBlock) {
      add_signed(from, r, sums);
      return;
    }
    for (int e = 0; e < count; ++e) {
      const double v = static_cast<double>(from[e]);
      sums[e % kLanes] += sign_bit(r, first + e) ? -v : v;
    }
  });
  return joined(sums);
}

constexpr int kBlocks = 64;  // worked on at a time, so that the arithmetic runs in vectors

// philox of consecutive blocks: the words of block b in x[...][b].
inline __attribute__((always_inline)) void philox_blocks(std::uint64_t seed, std::uint64_t row,
                                                         std::uint64_t block, Stream stream,
                                                         std::uint32_t (&x)[4][kBlocks]) {
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int b = 0; b < kBlocks; ++b) {
    x[0][b] = static_cast<std::uint32_t>(block + static_cast<std::uint64_t>(b));
    x[1][b] = static_cast<std::uint32_t>((block + static_cast<std::uint64_t>(b)) >> 32);
    x[2][b] = static_cast<std::uint32_t>(row);
    x[3][b] = static_cast<std::uint32_t>(row >> 32) ^ (static_cast<std::uint32_t>(stream) << 31);
  }
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t k0 = key[0], k1 = key[1];
    for (int b = 0; b < kBlocks; ++b) {
      const std::uint64_t p0 = kPhiloxMul0 * x[0][b], p1 = kPhiloxMul1 * x[2][b];
      x[0][b] = static_cast<std::uint32_t>(p1 >> 32) ^ x[1][b] ^ k0;
      x[2][b] = static_cast<std::uint32_t>(p0 >> 32) ^ x[3][b] ^ k1;
      x[1][b] = static_cast<std::uint32_t>(p1);
      x[3][b] = static_cast<std::uint32_t>(p0);
    }
    key[0] += kPhiloxWeyl0, key[1] += kPhiloxWeyl1;
  }
}

template <typename T>
void normal(std::uint64_t seed, std::uint64_t row, std::int64_t begin, std::int64_t end, T* out) {
  constexpr std::int64_t kSpan = kBlocks * kNormalsPerBlock;
  std::uint32_t x[4][kBlocks];
  float y[4][kBlocks];
  T tail[kSpan];
  for (std::int64_t start = begin / kNormalsPerBlock * kNormalsPerBlock; start < end; start += kSpan) {
    philox_blocks(seed, row, static_cast<std::uint64_t>(start / kNormalsPerBlock), Stream::kNormals, x);
    for (int b = 0; b < kBlocks; ++b) normal_pair(x[0][b], x[1][b], &y[0][b], &y[1][b]);
    for (int b = 0; b < kBlocks; ++b) normal_pair(x[2][b], x[3][b], &y[2][b], &y[3][b]);
    const bool whole = start >= begin && start + kSpan <= end;
    T* to = whole ? out + (start - begin) : tail;
    for (int b = 0; b < kBlocks; ++b) {
      for (int k = 0; k < 4; ++k) to[4 * b + k] = static_cast<T>(y[k][b]);
    }
    if (whole) continue;
    const std::int64_t from = begin > start ? begin : start,
                       until = end < start + kSpan ? end : start + kSpan;
    for (std::int64_t j = from; j < until; ++j) out[j - begin] = tail[j - start];
  }
}

template <typename T>
double dot(std::int64_t n, const T* x, const T* y) {
  double sums[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int e = 0; e < kLanes; ++e) sums[e] += static_cast<double>(x[j + e]) * static_cast<double>(y[j + e]);
  }
  for (; j < n; ++j) sums[j % kLanes] += static_cast<double>(x[j]) * static_cast<double>(y[j]);
  return joined(sums);
}

// residual = image - alpha current - beta previous; returns the sum of its squares. The residual may lie
// where the previous vector did.
template <typename T>
double three_term(std::int64_t n, const T* image, const T* current, const T* previous, double alpha,
                  double beta, T* residual) {
  const T a = static_cast<T>(alpha), b = static_cast<T>(beta);
  double sums[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    T r[kLanes];
    for (int e = 0; e < kLanes; ++e) r[e] = (image[j + e] - a * current[j + e]) - b * previous[j + e];
    for (int e = 0; e < kLanes; ++e) residual[j + e] = r[e];
    for (int e = 0; e < kLanes; ++e) sums[e] += static_cast<double>(r[e]) * static_cast<double>(r[e]);
  }
  for (; j < n; ++j) {
    const T r = (image[j] - a * current[j]) - b * previous[j];
    residual[j] = r;
    sums[j % kLanes] += static_cast<double>(r) * static_cast<double>(r);
  }
  return joined(sums);
}

extern const ProbeKernels probe_table;
const ProbeKernels probe_table = {
    {rademacher<float>, rademacher_dot<float>, normal<float>, dot<float>, three_term<float>},
    {rademacher<double>, rademacher_dot<double>, normal<double>, dot<double>, three_term<double>},
};

}  // namespace flatkern::cpu::FLATKERN_ISA
