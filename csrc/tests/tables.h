// The kernels that a test goes through: those of every instruction set of the CPU, or with
// FLATKERN_EMULATED_CUDA the CUDA kernels on the host, dressed as a table of the CPU's.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace tables {

#ifdef FLATKERN_EMULATED_CUDA
constexpr const char* kNames[] = {"cuda"};
#else
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
#endif

// nullptr where this processor lacks the instruction set.
const flatkern::cpu::Kernels* named(const char* name);

}  // namespace tables
