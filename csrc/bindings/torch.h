// torch's stable interface, the only part of torch that the bindings use: a library built with one torch works with
// every later one. The build defines TORCH_TARGET_VERSION, the first torch that it works with.
//
// Numbers go into messages through text() alone: torch's own checks put them through a stream (errors.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings/errors.h"

namespace delfast::bindings {

using torch::stable::Tensor;

// How an op's arguments arrive.
using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using IntList = std::vector<int64_t>;
using BoolList = std::vector<bool>;

// Throws what torch said of one of its own functions.
inline void check_torch(AOTITorchError error, const char* what) {
  if (error) throw std::runtime_error(text("torch could not ", what));
}

struct Device {
  int32_t type, index;

  bool operator==(const Device&) const = default;
};

inline Device device_of(const Tensor& t) {
  Device device;
  check_torch(aoti_torch_get_device_type(t.get(), &device.type), "tell a tensor's device");
  check_torch(aoti_torch_get_device_index(t.get(), &device.index), "tell a tensor's device");
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

// ---- tensors made here

inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype, Device device) {
  AtenTensorHandle made = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  check_torch(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), code, device.type,
                                       device.index, &made),
              "allocate a tensor");
  return Tensor(made);
}

inline Tensor empty(const IntList& sizes, ScalarType dtype, Device device = {aoti_torch_device_type_cpu(), 0}) {
  IntList strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return empty_strided(sizes, strides, dtype, device);
}

// The same memory under a version counter of its own.
inline Tensor without_version(const Tensor& t) {
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
