// Attention and its derivatives: a block for every 64 queries, 64 keys or tile of the mask, each sum in a
// fixed order. What a block does is in common/attention_passes.h.
#include "attention.h"
#include "launch.cuh"

namespace flatkern::cuda {
namespace {

using attention::kThreads;

struct BlockTeam {
  attention::Registers<float>& own;

  template <typename F>
  FLATKERN_HD void phase(const F& f) {
#if defined(__CUDA_ARCH__) || defined(FLATKERN_EMULATED_CUDA)
    f(static_cast<int>(threadIdx.x), own);
    __syncthreads();
#endif
  }
};

template <typename Pass>
__device__ __forceinline__ void stride_over_units(const Pass& pass, std::int64_t count) {
  __shared__ attention::Room<float> room;
  attention::Registers<float> own;
  BlockTeam team = {own};
  for (std::int64_t unit = blockIdx.x; unit < count; unit += gridDim.x) pass(team, room, unit);
}

// Two blocks a multiprocessor, for passes that do with 128 registers; one, for those that hold more products.
template <typename Pass>
__global__ void __launch_bounds__(kThreads, 2) units_in_pairs(Pass pass, std::int64_t count) {
  stride_over_units(pass, count);
}

#if CUDART_VERSION >= 12040
#define FLATKERN_ALONE __maxnreg__(240)
#else
#define FLATKERN_ALONE __launch_bounds__(kThreads)
#endif
template <typename Pass>
__global__ void FLATKERN_ALONE units_alone(Pass pass, std::int64_t count) {
  stride_over_units(pass, count);
}

template <typename Pass>
int launch(void (*kernel)(Pass, std::int64_t), const Pass& pass, void* stream) {
  const std::int64_t count = pass.units(), most = most_blocks(1 << 30);
  if (count == 0) return 0;
  const unsigned blocks = static_cast<unsigned>(count < most ? count : most);
  return launch_kernel(kernel, blocks, kThreads, 0, stream, pass, count);
}

}  // namespace

int run(const attention::Forward<float>& pass, void* stream) {
  return launch(units_in_pairs<std::decay_t<decltype(pass)>>, pass, stream);
}

int run(const attention::Tangent<float>& pass, void* stream) {
  return launch(units_in_pairs<std::decay_t<decltype(pass)>>, pass, stream);
}

template <bool twice>
int run(const attention::QuerySums<float, twice>& pass, void* stream) {
  typedef attention::QuerySums<float, twice> Pass;
  if constexpr (twice) {
    return launch(units_alone<Pass>, pass, stream);
  } else {
    return launch(units_in_pairs<Pass>, pass, stream);
  }
}

template <bool twice>
int run(const attention::KeySums<float, twice>& pass, void* stream) {
  return launch(units_alone<std::decay_t<decltype(pass)>>, pass, stream);
}

template <bool twice>
int run(const attention::MaskSums<float, twice>& pass, void* stream) {
  return launch(units_alone<std::decay_t<decltype(pass)>>, pass, stream);
}

#define FLATKERN_INSTANTIATE(twice)                                   \
  template int run(const attention::QuerySums<float, twice>&, void*); \
  template int run(const attention::KeySums<float, twice>&, void*);   \
  template int run(const attention::MaskSums<float, twice>&, void*);
FLATKERN_INSTANTIATE(false)
FLATKERN_INSTANTIATE(true)

}  // namespace flatkern::cuda
