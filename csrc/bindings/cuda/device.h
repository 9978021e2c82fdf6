// Code shared by all CUDA bindings around a launcher: the tensors' device, its current stream, memory, the result.
// bindings/checks.h checks before that all tensors are on that device, so that refusals need no GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch.h"
#include "delfast/cuda_launch.h"

// Weak, since it is missing in a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace delfast::bindings {

// A device that is current for the lifetime of the object.
class OnDevice {
 public:
  explicit OnDevice(Device device) : device_(device), guard_(device.index) {}

  Tensor empty(const IntList& sizes, ScalarType dtype) const { return bindings::empty(sizes, dtype, device_); }
  cuda::Stream stream() const {
    void* stream = nullptr;
    check_torch(aoti_torch_get_current_cuda_stream(device_.index, &stream), "read the current stream");
    return static_cast<cuda::Stream>(stream);
  }

 private:
  Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(cuda::Error error, const char* op) {
  if (error)
    throw std::runtime_error(text("delfast::", op, ": '", error,
                                  "'; delfast.status()['cuda'] lists the GPUs it was built for; ",
                                  "CUDA_LAUNCH_BLOCKING=1 shows an error where it happens"));
}

}  // namespace delfast::bindings
