// Picks the kernels for the processor at hand, once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace flatkern::cpu {

namespace baseline {
extern const Kernels table;
}
#ifdef FLATKERN_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels* const kBaseline = &baseline::table;

const Kernels* avx2_table() {
#ifdef FLATKERN_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
  return nullptr;
}

const Kernels* avx512_table() {
#ifdef FLATKERN_X86
  if (avx2_table() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return &avx512::table;
  }
#endif
  return nullptr;
}

const Kernels* choose() {
  const char* asked = std::getenv("FLATKERN_ISA");
  if (asked && *asked) {
    if (const Kernels* k = kernels_for(asked)) return k;
  }
  if (const Kernels* k = avx512_table()) return k;
  if (const Kernels* k = avx2_table()) return k;
  return kBaseline;
}

constexpr double kNanosecondsPerThread = 100e3;

std::int64_t grain(double nanoseconds_per_sample) {
  const double samples = kNanosecondsPerThread / nanoseconds_per_sample;
  return static_cast<std::int64_t>(samples) + 1;
}

}  // namespace

const Kernels* kernels_for(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return kBaseline;
  if (std::strcmp(isa, "avx2") == 0) return avx2_table();
  if (std::strcmp(isa, "avx512") == 0) return avx512_table();
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

// Rough costs of AVX2 kernels; only their order of magnitude matters.
std::int64_t grain_spd(std::int64_t c) {
  const double n = static_cast<double>(c);
  return grain(5 + 0.5 * n * n + 0.03 * n * n * n);
}

std::int64_t grain_gram(std::int64_t c, std::int64_t d) {
  const double n = static_cast<double>(c);
  return grain(20 + 1.0 * n * n + 0.03 * n * n * n + 0.05 * n * n * static_cast<double>(d));
}

std::int64_t grain_chunks(std::int64_t tangents) {
  return grain(0.5 * static_cast<double>(kJetChunk) * static_cast<double>(2 + tangents));
}

std::int64_t grain_rows(std::int64_t cols, std::int64_t tangents) {
  return grain(50 + 0.5 * static_cast<double>(cols) * static_cast<double>(2 + 2 * tangents));
}

std::int64_t grain_ghost(std::int64_t cotangents, std::int64_t positions, std::int64_t d_in,
                         std::int64_t d_out, bool formed) {
  const double k = static_cast<double>(cotangents), t = static_cast<double>(positions);
  const double a = static_cast<double>(d_in), g = static_cast<double>(d_out);
  return grain(200 + 0.03 * (formed ? k * t * a * g : 0.5 * t * t * (a + k * g)));
}

std::int64_t grain_spectrum(std::int64_t c, std::int64_t d) {
  const double n = static_cast<double>(c);
  return grain(20 + 10 * n * n + 0.5 * n * n * n + 0.05 * n * n * static_cast<double>(d));
}

}  // namespace flatkern::cpu
