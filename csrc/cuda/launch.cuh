// How every kernel is launched, and how it names the shared memory that a launch sizes: on a GPU, or in the
// tests on the host (csrc/tests/emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace flatkern::cuda {

#ifdef FLATKERN_EMULATED_CUDA
#define FLATKERN_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::dynamic_shared())
#else
#define FLATKERN_DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]
#endif

// A block has 48 KiB of shared memory without asking for more, of which a kernel's own arrays are a part.
constexpr std::size_t kSharedByDefault = 40 << 10;

// How many blocks a grid may have in a dimension where kernels stride over what is left: few in the tests, so
// that they do.
constexpr std::int64_t most_blocks([[maybe_unused]] std::int64_t on_a_gpu) {
#ifdef FLATKERN_EMULATED_CUDA
  return 3;
#else
  return on_a_gpu;
#endif
}

// Blocks to launch: one a unit of work, up to what 2^16 - 1 can hold; the kernels stride over the rest.
inline unsigned blocks_for(std::int64_t units) {
  constexpr std::int64_t most = most_blocks(65535);
  return static_cast<unsigned>(units < most ? units : most);
}

// One launch on the stream; returns the error code.
template <typename... Parameters, typename... Arguments>
int launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared_bytes,
                  [[maybe_unused]] void* stream, const Arguments&... arguments) {
  if (shared_bytes > kSharedByDefault) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
#ifdef FLATKERN_EMULATED_CUDA
  emulation::launch(kernel, grid, threads, shared_bytes, arguments...);
#else
  // clang-format off: it would take the brackets apart
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
#endif
  return static_cast<int>(cudaGetLastError());
}

}  // namespace flatkern::cuda
