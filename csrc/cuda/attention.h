// Attention's CUDA kernels as the torch door sees them: one launch on the stream, no allocation, no
// synchronization; the launch's error code is returned.
#pragma once

#include "../common/attention_runs.h"

namespace flatkern::cuda {

int run(const attention::Forward<float>& pass, void* stream);
int run(const attention::Tangent<float>& pass, void* stream);
template <bool twice>
int run(const attention::QuerySums<float, twice>& pass, void* stream);
template <bool twice>
int run(const attention::KeySums<float, twice>& pass, void* stream);
template <bool twice>
int run(const attention::MaskSums<float, twice>& pass, void* stream);

const char* error_string(int error);

}  // namespace flatkern::cuda
