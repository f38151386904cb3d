// The CUDA kernels as the torch door sees them: raw pointers and a stream, no CUDA header.
// Each launches on the stream, neither allocates nor synchronizes, and returns the launch's error code
// (a cudaError_t, 0 for success). float and double are instantiated.
#pragma once

#include <cstdint>

#include "../common/matrices.h"

namespace flatkern::cuda {

// One block a sample reaches this far; larger matrices are composed of library calls on the Python side.
constexpr std::int64_t kMaxSize = 128;

template <typename T>
int spd_logdet(const Matrices<T>& g, T* out, void* stream);

// x x^T in double, both triangles written.
template <typename T>
int gram(const Matrices<T>& x, double* out, void* stream);

template <typename T>
int gram_stats(const Matrices<T>& x, const GramStatsOut& out, void* stream);

// weight[i] times the inverse of matrix i; see csrc/cpu/batch_spd.h.
template <typename T>
int spd_pullback(const Matrices<T>& g, const T* weight, T* out, void* stream);

// 2 (g_tr I + 2 g_F G + g_ld G^-1) x
template <typename T>
int gram_pullback(const Matrices<T>& x, const GramCotangents& g, T* out, void* stream);

// Up to this many rows.
constexpr std::int64_t kMaxSpectrum = 64;

// Singular values [n, c] descending and, unless null, left singular vectors [n, c, c] as rows; `grams` is
// room for n c c numbers and may be `vectors`. Below `floor` of the largest eigenvalue of the Gram matrix, or
// where it has lost digits, in double-double from the rows.
template <typename T>
int gram_spectrum(const Matrices<T>& x, double floor, double* grams, double* values, double* vectors,
                  void* stream);

// Random rows [rows, size] of philox.h, the first of them `first`.
template <typename T>
int rademacher(std::uint64_t seed, std::uint64_t first, std::int64_t rows, std::int64_t size, T* out,
               void* stream);

template <typename T>
int normal(std::uint64_t seed, std::uint64_t first, std::int64_t rows, std::int64_t size, T* out,
           void* stream);

// Dots of x [batch, rows, size] with those sign rows; `partial` is room for probe_blocks(size) numbers a row.
template <typename T>
int rademacher_dots(std::uint64_t seed, std::uint64_t first, std::int64_t batch, std::int64_t rows,
                    std::int64_t size, const T* x, double* partial, double* out, void* stream);

std::int64_t probe_blocks(std::int64_t size);

// Rows with unit strides inside them.
template <typename T>
struct Strided {
  T* data;
  std::int64_t stride;

  FLATKERN_HD T* row(std::int64_t i) const { return data + i * stride; }
  Strided from(std::int64_t i) const { return {data + i * stride, stride}; }
};

// See csrc/cpu/probe_rows.h; `partial` is room for lanczos_blocks(size) numbers a row.
template <typename T>
int lanczos_step(std::int64_t rows, std::int64_t size, Strided<const T> image, Strided<const T> current,
                 Strided<const T> previous, const double* beta, Strided<T> residual, double* partial,
                 double* alpha, double* norm, void* stream);

std::int64_t lanczos_blocks(std::int64_t size);

const char* error_string(int error);

}  // namespace flatkern::cuda
