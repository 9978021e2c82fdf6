// What every CUDA binding does around a launcher: one device for all tensors, its current stream, memory, the outcome.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include "delfast/cuda_launch.h"

namespace delfast::bindings {

// The device of the first tensor, made current for as long as this lives; all others must be there too.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& first) : device_(cuda_device(first)), guard_(device_) {}

  void check(const at::Tensor& t, const char* role) const {
    TORCH_CHECK_VALUE(t.device() == device_, "expected ", role, " on ", device_, ", got it on ", t.device(),
                      "; move all tensors to one device");
  }
  void check(at::TensorList list, const char* role) const {
    for (size_t i = 0; i < list.size(); i++)
      TORCH_CHECK_VALUE(list[i].device() == device_, "expected ", role, " #", i, " on ", device_, ", got it on ",
                        list[i].device(), "; move all tensors to one device");
  }

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, at::TensorOptions().device(device_).dtype(dtype));
  }
  cuda::Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  static c10::Device cuda_device(const at::Tensor& t) {
    TORCH_CHECK_VALUE(t.is_cuda(), "expected tensors on a CUDA device, got one on ", t.device(),
                      "; move all tensors to one device");
    return t.device();
  }

  c10::Device device_;
  c10::cuda::CUDAGuard guard_;
};

inline void check_launch(cuda::Error error, const char* op) {
  TORCH_CHECK(!error, "delfast::", op, ": '", error ? error : "",
              "'; delfast.status()['cuda'] says which cards it was ",
              "built for; CUDA_LAUNCH_BLOCKING=1 shows an error where it happens");
}

}  // namespace delfast::bindings
