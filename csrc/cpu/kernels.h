// The CPU kernels: raw pointers and strides in, results out. One table of them per instruction set.
#pragma once

#include <cstdint>

#include "../common/ghost.h"
#include "../common/matrices.h"
#include "../common/scattered_conv.h"
#include "jet_kernels.h"

namespace flatkern::cpu {

// Beyond this size LAPACK's blocking wins and the doors compose the result from a matrix product and
// Cholesky.
constexpr std::int64_t kMaxSize = 128;

// The same for spectra: the eigenvalues of larger matrices are LAPACK's.
constexpr std::int64_t kMaxSpectrum = 64;

// Every kernel works on samples [begin, end) of the batch on the calling thread; outputs are contiguous over
// the batch and indexed by the absolute sample number, so that ranges can go to different threads.
template <typename T>
using SpdLogdet = void (*)(const Matrices<T>& g, std::int64_t begin, std::int64_t end, T* out);

// weight[n] times the inverse of matrix n, [n, c, c].
template <typename T>
using SpdPullback = void (*)(const Matrices<T>& g, const T* weight, std::int64_t begin, std::int64_t end,
                             T* out);

template <typename T>
using Gram = void (*)(const Matrices<T>& x, std::int64_t begin, std::int64_t end, double* out);

template <typename T>
using GramStats = void (*)(const Matrices<T>& x, std::int64_t begin, std::int64_t end,
                           const GramStatsOut& out);

// The derivative of the statistics along the cotangents, [n, c, d].
template <typename T>
using GramPullback = void (*)(const Matrices<T>& x, const GramCotangents& g, std::int64_t begin,
                              std::int64_t end, T* out);

// Singular values, descending, [n, c], and left singular vectors as rows, [n, c, c] (null: not wanted).
// Samples with eigenvalues of the Gram matrix below `floor` times the largest are decomposed directly.
template <typename T>
using GramSpectrum = void (*)(const Matrices<T>& x, double floor, std::int64_t begin, std::int64_t end,
                              double* values, double* vectors);

constexpr double kGramFloor = 1e-10;  // six digits of the smallest singular value are gone

// L of x = L Q for the samples marked, [n, c, c], zeros for the others; any c.
template <typename T>
using Lq = void (*)(const Matrices<T>& x, const bool* wanted, std::int64_t begin, std::int64_t end,
                    double* out);

// |sum_t g_kt a_t^T|^2, [K, n], by tiles of the sums (`formed`) or of the T x T Gram matrices.
template <typename T>
using GhostNorm = void (*)(const GhostInput<T>& x, bool formed, std::int64_t begin, std::int64_t end,
                           double* out);

template <typename T>
struct TypedKernels {
  SpdLogdet<T> spd_logdet;
  SpdPullback<T> spd_pullback;
  Gram<T> gram;
  GramStats<T> gram_stats;
  GramPullback<T> gram_pullback;
  GramSpectrum<T> gram_spectrum;
  Lq<T> lq;
  GhostNorm<T> ghost_norm;
};

// Ranges [begin, end) of one row of random numbers, and ranges of n elements; see probes.h.
template <typename T>
struct TypedProbeKernels {
  void (*rademacher)(std::uint64_t seed, std::uint64_t row, std::int64_t begin, std::int64_t end, T* out);
  double (*rademacher_dot)(std::uint64_t seed, std::uint64_t row, std::int64_t begin, std::int64_t end,
                           const T* x);
  void (*normal)(std::uint64_t seed, std::uint64_t row, std::int64_t begin, std::int64_t end, T* out);
  double (*dot)(std::int64_t n, const T* x, const T* y);
  double (*three_term)(std::int64_t n, const T* image, const T* current, const T* previous, double alpha,
                       double beta, T* residual);
};

struct ProbeKernels {
  TypedProbeKernels<float> f32;
  TypedProbeKernels<double> f64;

  const TypedProbeKernels<float>& of(float) const { return f32; }
  const TypedProbeKernels<double>& of(double) const { return f64; }
};

// Convolutions pulled back from scattered cotangents, samples [begin, end); see scattered_conv.h.
template <typename T>
struct ScatteredConvKernels {
  // bytes of scratch memory that a call needs, with sums over the input or without
  std::int64_t (*bytes)(const ScatteredConv& s, bool sums);
  void (*input)(const ScatteredConv& s, const T* values, const std::int64_t* index, const T* weight,
                std::int64_t begin, std::int64_t end, char* scratch, T* out);
  void (*norms)(const ScatteredConv& s, const T* values, const std::int64_t* index, const T* input,
                std::int64_t begin, std::int64_t end, char* scratch, double* weight_sq, double* bias_sq,
                double* place_sq);
};

// Elements whose sums are added up before they are joined, in order: the result depends on no thread count.
constexpr std::int64_t kProbeChunk = 1 << 16;

struct Kernels {
  const char* isa;
  int vector_bytes;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  JetKernels<float> jets_f32;
  JetKernels<double> jets_f64;
  JetKernels<Bf16> jets_bf16;
  const ProbeKernels* probes;
  ScatteredConvKernels<float> scattered_f32;
  ScatteredConvKernels<double> scattered_f64;

  const TypedKernels<float>& of(float) const { return f32; }
  const TypedKernels<double>& of(double) const { return f64; }
  const ScatteredConvKernels<float>& scattered(float) const { return scattered_f32; }
  const ScatteredConvKernels<double>& scattered(double) const { return scattered_f64; }
  const JetKernels<float>& jets(float) const { return jets_f32; }
  const JetKernels<double>& jets(double) const { return jets_f64; }
  const JetKernels<Bf16>& jets(Bf16) const { return jets_bf16; }
};

// The best table for this processor, chosen once; the environment variable FLATKERN_ISA
// (baseline, avx2, avx512) can ask for a lesser one.
const Kernels& kernels();

// The table of a named instruction set; nullptr where this build or processor lacks it.
const Kernels* kernels_for(const char* isa);

// Samples one thread should get at least: below about 100 us of work a thread costs more than it brings.
std::int64_t grain_spd(std::int64_t c);
std::int64_t grain_gram(std::int64_t c, std::int64_t d);
std::int64_t grain_spectrum(std::int64_t c, std::int64_t d);
std::int64_t grain_ghost(std::int64_t cotangents, std::int64_t positions, std::int64_t d_in,
                         std::int64_t d_out, bool formed);

}  // namespace flatkern::cpu
