// The table of kernels of one instruction set; each isa_*.cpp instantiates it once.
#pragma once

#include "gram_spectrum.h"
#include "gram_stats.h"

namespace flatkern::cpu::FLATKERN_ISA {

extern const Kernels table;
const Kernels table = {
    FLATKERN_ISA_NAME,
    FLATKERN_VECTOR_BYTES,
    {spd_logdet<float>, spd_pullback<float>, gram<float>, gram_stats<float>, gram_pullback<float>,
     gram_spectrum<float>, lq<float>},
    {spd_logdet<double>, spd_pullback<double>, gram<double>, gram_stats<double>, gram_pullback<double>,
     gram_spectrum<double>, lq<double>},
};

}  // namespace flatkern::cpu::FLATKERN_ISA
