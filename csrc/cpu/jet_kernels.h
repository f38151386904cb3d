// The jets' part of the table of CPU kernels: activations in chunks of the primal, softmax and norms by rows.
#pragma once

#include <cstdint>

#include "../common/jets.h"

namespace flatkern::cpu {

constexpr std::int64_t kJetChunk = 512;           // entries of a primal evaluated at a time
constexpr std::int64_t kPastCaches = 16ll << 20;  // bytes of results from which stores pass the caches by
constexpr std::int64_t kRowPadding = 16;          // a scratch row is a multiple of this many entries

// Every kernel works on [begin, end) of its chunks or rows on the calling thread. Rows need `scratch`,
// scratch_entries(cols) values that only this thread uses.
template <typename E>
struct JetKernels {
  void (*derivatives)(const ActivationSpec& spec, const ActivationDerivativesArgs<E>& args, std::int64_t n,
                      std::int64_t begin, std::int64_t end);
  void (*jet)(const ActivationSpec& spec, const ActivationJetArgs<E>& args, std::int64_t n,
              std::int64_t begin, std::int64_t end);
  void (*pullback)(const ActivationSpec& spec, const ActivationPullbackArgs<E>& args, std::int64_t n,
                   std::int64_t begin, std::int64_t end);
  void (*softmax_curvature)(const SoftmaxCurvatureArgs<E>& args, std::int64_t begin, std::int64_t end,
                            wide_t<E>* scratch);
  void (*logsumexp)(const LogSumExpArgs<E>& args, std::int64_t begin, std::int64_t end, wide_t<E>* scratch);
  void (*norm_tangent)(const NormTangentArgs<E>& args, std::int64_t begin, std::int64_t end,
                       wide_t<E>* scratch);
  void (*norm_curvature)(const NormCurvatureArgs<E>& args, std::int64_t begin, std::int64_t end,
                         wide_t<E>* scratch);
};

inline std::int64_t jet_chunks(std::int64_t n) {
  return (n + kJetChunk - 1) / kJetChunk;
}

inline std::int64_t scratch_entries(std::int64_t cols) {
  return (cols + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// Chunks and rows one thread should get at least.
std::int64_t grain_chunks(std::int64_t tangents);
std::int64_t grain_rows(std::int64_t cols, std::int64_t tangents);

}  // namespace flatkern::cpu
