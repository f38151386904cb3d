// Marks functions that the host and the GPU share, so that the CPU tests exercise what the GPU runs.
// Always inlined on the host: the kernels are compiled once per instruction set, and an out-of-line copy made
// for one of them must never be the one that the linker keeps for all.
#pragma once

#ifdef __CUDACC__
#define FLATKERN_HD __host__ __device__ __forceinline__
#else
#define FLATKERN_HD inline __attribute__((always_inline))
#endif
