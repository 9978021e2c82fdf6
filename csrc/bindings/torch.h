// torch's stable interface, the only part of torch that the bindings use: a library built with one torch works with
// every later one. The build defines TORCH_TARGET_VERSION, the oldest torch that the library works with.
//
// Numbers in messages are formatted only by text(): torch's own checks use a stream (errors.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings/errors.h"

// Weak, since it is missing before torch 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace delfast::bindings {

using torch::stable::Tensor;

// Types of an op's arguments.
using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using IntList = std::vector<int64_t>;
using BoolList = std::vector<bool>;

// Throws if one of torch's functions failed. The reason is torch's from 2.13 on, and `likely` before.
inline void check_torch(AOTITorchError error, const char* what, const char* likely = nullptr) {
  if (!error) return;
  const char* const why =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : likely;
  throw std::runtime_error(text("torch could not ", what, why ? ": " : "", why ? why : ""));
}

// A dtype of torch's, including dtypes that the stable interface does not name.
struct TorchDtype {
  int32_t code;

  bool operator==(const TorchDtype&) const = default;
  bool operator==(ScalarType type) const {
    return code == torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  }
};

inline TorchDtype type_of(const Tensor& t) {
  TorchDtype type;
  check_torch(aoti_torch_get_dtype(t.get(), &type.code), "read a tensor's dtype");
  return type;
}

inline std::string text_of(TorchDtype type) {
  try {
    return torch::headeronly::toString(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(type.code)));
  } catch (const std::runtime_error&) {
    return text("dtype ", type.code);
  }
}

struct Device {
  int32_t type, index;

  bool operator==(const Device&) const = default;
};

inline Device device_of(const Tensor& t) {
  Device device;
  check_torch(aoti_torch_get_device_type(t.get(), &device.type), "read a tensor's device");
  check_torch(aoti_torch_get_device_index(t.get(), &device.index), "read a tensor's device");
  return device;
}

inline std::string text_of(const Device& device) {
  const auto name = [&]() -> std::string {
    if (device.type == aoti_torch_device_type_cpu()) return "cpu";
    if (device.type == aoti_torch_device_type_cuda()) return "cuda";
    if (device.type == aoti_torch_device_type_meta()) return "meta";
    return text("device type ", device.type);
  };
  return device.index < 0 || name() == "cpu" ? name() : text(name(), ":", device.index);
}

// ---- new tensors

// Training loops that retry with smaller batches search for the text of torch's own error, "CUDA out of memory.".
inline Tensor empty_strided(Sizes sizes, Sizes strides, TorchDtype dtype, Device device) {
  AtenTensorHandle made = nullptr;
  const bool on_cuda = device.type == aoti_torch_device_type_cuda();
  check_torch(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype.code, device.type,
                                       device.index, &made),
              "allocate a tensor", on_cuda ? "probably CUDA out of memory." : "probably out of memory.");
  return Tensor(made);
}

inline const Device kCpu = {aoti_torch_device_type_cpu(), 0};

inline Tensor empty(const IntList& sizes, TorchDtype dtype, Device device = kCpu) {
  IntList strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return empty_strided(sizes, strides, dtype, device);
}

inline Tensor empty(const IntList& sizes, ScalarType dtype, Device device = kCpu) {
  return empty(sizes, TorchDtype{torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))}, device);
}

// Returns the same memory as a tensor that autograd does not track, with a version counter of its own.
inline Tensor untracked(const Tensor& t) {
  AtenTensorHandle made = nullptr;
  const Sizes sizes = t.sizes(), strides = t.strides();
  check_torch(aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.data(), strides.data(), 0, &made),
              "make a view");
  return Tensor(made);
}

inline double number_in(const Tensor& t) {
  double number = 0;
  check_torch(aoti_torch_item_float64(t.get(), &number), "read a number");
  return number;
}

}  // namespace delfast::bindings
