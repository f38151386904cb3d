// The table of kernels of one instruction set; each isa_*.cpp instantiates it once.
#pragma once

#include "ghost_norm.h"
#include "gram_spectrum.h"
#include "gram_stats.h"
#include "norm_jets.h"
#include "scattered_conv.h"
#include "softmax_jets.h"

namespace flatkern::cpu::FLATKERN_ISA {

template <typename E>
constexpr JetKernels<E> jet_kernels = {activation_derivatives<E>, activation_jet<E>, activation_pullback<E>,
                                       softmax_curvature<E>,      logsumexp_jet<E>,  norm_tangent<E>,
                                       norm_curvature<E>};

extern const ProbeKernels probe_table;
extern const Kernels table;
const Kernels table = {
    FLATKERN_ISA_NAME,
    FLATKERN_VECTOR_BYTES,
    {spd_logdet<float>, spd_pullback<float>, gram<float>, gram_stats<float>, gram_pullback<float>,
     gram_spectrum<float>, lq<float>, ghost_norm<float>},
    {spd_logdet<double>, spd_pullback<double>, gram<double>, gram_stats<double>, gram_pullback<double>,
     gram_spectrum<double>, lq<double>, ghost_norm<double>},
    jet_kernels<float>,
    jet_kernels<double>,
    jet_kernels<Bf16>,
    &probe_table,
    {scattered_bytes<float>, scattered_input<float>, scattered_norms<float>},
    {scattered_bytes<double>, scattered_input<double>, scattered_norms<double>},
};

}  // namespace flatkern::cpu::FLATKERN_ISA
