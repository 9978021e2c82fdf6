// What every CUDA binding does around a launcher: the tensors' device, its current stream, memory, the outcome. That
// all tensors are on that device is checked before (bindings/checks.h): what is refused needs no card.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "bindings/errors.h"
#include "delfast/cuda_launch.h"

namespace delfast::bindings {

// A device, made current for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device) : device_(device), guard_(device) {}

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, at::TensorOptions().device(device_).dtype(dtype));
  }
  cuda::Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::Device device_;
  c10::cuda::CUDAGuard guard_;
};

inline void check_launch(cuda::Error error, const char* op) {
  TORCH_CHECK(!error, text("delfast::", op, ": '", error ? error : "",
                           "'; delfast.status()['cuda'] says which cards it was built for; ",
                           "CUDA_LAUNCH_BLOCKING=1 shows an error where it happens"));
}

}  // namespace delfast::bindings
