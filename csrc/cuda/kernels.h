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

const char* error_string(int error);

}  // namespace flatkern::cuda
