// What the torch doors of the CUDA kernels share: the device and the stream that a call goes to, and the
// error code that it returns. With FLATKERN_EMULATED_CUDA the kernels run on the host, on CPU tensors
// (csrc/tests/emulation).
#pragma once

#ifdef FLATKERN_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace flatkern {

namespace cuda {
const char* error_string(int error);
}

#ifdef FLATKERN_EMULATED_CUDA
#define FLATKERN_GPU_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(flatkern, CPU, m)

inline bool on_gpu(const torch::stable::Tensor&) {
  return true;
}
#else
#define FLATKERN_GPU_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(flatkern, CUDA, m)
// On a torch without CUDA this symbol is absent; weak, it lets the very same library load there.
#pragma weak aoti_torch_get_current_cuda_stream

inline bool on_gpu(const torch::stable::Tensor& x) {
  return x.is_cuda();
}
#endif

// Alive, it keeps the tensor's device the current one.
class GpuCall {
 public:
#ifdef FLATKERN_EMULATED_CUDA
  explicit GpuCall(const torch::stable::Tensor&) {}
#else
  explicit GpuCall(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
#endif

  void* stream() const { return stream_; }

  void check(int error) const {
    STD_TORCH_CHECK(error == 0, "flatkern: CUDA kernel launch failed: ", cuda::error_string(error));
  }

 private:
#ifndef FLATKERN_EMULATED_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace flatkern
#endif
