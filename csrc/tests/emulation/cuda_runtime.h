// As much of CUDA as the kernels in csrc/cuda use, on the host: the same sources compiled by a C++ compiler
// (-x c++ -DFLATKERN_EMULATED_CUDA, with this directory before the toolkit's). A block runs at a time and
// each of its threads is a fiber (block.h), so shuffles, votes and barriers do what they do on a GPU, and
// what a GPU leaves undefined ends the program: a barrier that some threads do not reach, or reach elsewhere,
// and an exchange with a lane that has ended.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "block.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define threadIdx (::emulation::place.thread)
#define blockIdx (::emulation::place.block)
#define blockDim (::emulation::place.threads)
#define gridDim (::emulation::place.grid)

using dim3 = ::emulation::Extent;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(std::exchange(::emulation::last_error, 0));
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  const bool possible = ::emulation::allow_shared(reinterpret_cast<void (*)()>(kernel), bytes);
  return possible ? cudaSuccess : cudaErrorInvalidValue;
}

#define __syncthreads() ::emulation::block_barrier({__FILE__, __LINE__})
#define __syncthreads_and(x) ::emulation::block_vote({__FILE__, __LINE__}, (x), true)
#define __syncthreads_or(x) ::emulation::block_vote({__FILE__, __LINE__}, (x), false)
#define __syncwarp() ::emulation::warp_barrier({__FILE__, __LINE__})
#define __shfl_sync(mask, ...) ::emulation::shuffle({__FILE__, __LINE__}, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) ::emulation::shuffle_xor({__FILE__, __LINE__}, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) ::emulation::shuffle_down({__FILE__, __LINE__}, mask, __VA_ARGS__)
#define __ballot_sync(mask, x) ::emulation::ballot({__FILE__, __LINE__}, mask, (x))
#define __all_sync(mask, x) (::emulation::ballot({__FILE__, __LINE__}, mask, (x)) == 0xffffffffu)

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
