// The table of kernels of one instruction set; each isa_*.cpp instantiates it once.
#pragma once

#include "batch_gram.h"

namespace flatkern::cpu::FLATKERN_ISA {

extern const ProbeKernels probe_table;
extern const Kernels table;
const Kernels table = {
    FLATKERN_ISA_NAME,
    FLATKERN_VECTOR_BYTES,
    {spd_logdet<float>, spd_inverse<float>, gram<float>, gram_stats<float>},
    {spd_logdet<double>, spd_inverse<double>, gram<double>, gram_stats<double>},
    &probe_table,
};

}  // namespace flatkern::cpu::FLATKERN_ISA
