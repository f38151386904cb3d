// The jets' CUDA kernels as the torch door sees them: one launch on the stream, no allocation, no
// synchronization; the launch's error code is returned. float, double and Bf16 are instantiated.
#pragma once

#include <cstdint>

#include "../common/jets.h"

namespace flatkern::cuda {

template <typename E>
int run(const ActivationSpec& spec, const ActivationDerivativesArgs<E>& args, std::int64_t n, void* stream);
template <typename E>
int run(const ActivationSpec& spec, const ActivationJetArgs<E>& args, std::int64_t n, void* stream);
template <typename E>
int run(const ActivationSpec& spec, const ActivationPullbackArgs<E>& args, std::int64_t n, void* stream);

template <typename E>
int run(const SoftmaxCurvatureArgs<E>& args, void* stream);
template <typename E>
int run(const LogSumExpArgs<E>& args, void* stream);
template <typename E>
int run(const NormTangentArgs<E>& args, void* stream);
template <typename E>
int run(const NormCurvatureArgs<E>& args, void* stream);

const char* error_string(int error);

}  // namespace flatkern::cuda
