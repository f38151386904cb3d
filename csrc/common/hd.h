// Marks functions that the host and the GPU share, so that the CPU tests exercise what the GPU runs.
// Always inlined on the host: the kernels are compiled once per instruction set, and an out-of-line copy made
// for one of them must never be the one that the linker keeps for all.
#pragma once

#ifdef __CUDACC__
#define FLATKERN_HD __host__ __device__ __forceinline__
#else
#define FLATKERN_HD inline __attribute__((always_inline))
#endif

// Unrolls the loop that follows in GPU code, where indices into registers have to be constants; by n only,
// where more of it would only take registers.
#ifdef __CUDACC__
#define FLATKERN_UNROLL _Pragma("unroll")
#define FLATKERN_UNROLL_BY(n) FLATKERN_PRAGMA(unroll n)
#define FLATKERN_PRAGMA(text) _Pragma(#text)
#else
#define FLATKERN_UNROLL
#define FLATKERN_UNROLL_BY(n)
#endif
