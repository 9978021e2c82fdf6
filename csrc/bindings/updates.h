// The checks of the masked updates on every device, and the list of parameters that the kernels read.
#pragma once

#include "bindings/checks.h"
#include "bindings/versions.h"
#include "delfast/mask_plan.h"

namespace delfast::bindings {

// Checks the lengths of the lists, and the bits.
inline void check_bits(Device device, const Tensor& bits, size_t params, size_t sources, size_t by_row) {
  check_device(device, bits, "bits");
  DELFAST_CHECK_VALUE(sources == params && by_row == params, "expected lists of equal length, got ", params,
                      " parameters, ", sources, " gradients (or fresh values) and ", by_row,
                      " values of by_row; pass one each");
  DELFAST_CHECK_VALUE(type_of(bits) == ScalarType::Byte && bits.dim() == 1 && bits.is_contiguous(),
                      "expected bits to be contiguous uint8 (bytes,), got ", type_of(bits), " ", bits.sizes(),
                      "; concatenate the masks' packed bits");
}

// Sets each parameter's bits; returns the number of bytes after the last parameter's. The values of the bits are not
// read.
inline int64_t place_bits(const Tensor& bits, std::vector<Updated>& params) {
  const uint8_t* next = bits.const_data_ptr<uint8_t>();
  int64_t left = bits.numel();
  for (size_t i = 0; i < params.size(); i++) {
    const int64_t bytes = (units_of(params[i]) + 7) / 8;
    DELFAST_CHECK_VALUE(bytes <= left, "expected ", bytes, " bytes of bits for parameter #", i, ", got ", left,
                        "; the mask is of other parameters");
    params[i].bits = next;
    next += bytes;
    left -= bytes;
  }
  return left;
}

inline void check_no_more_bits(int64_t left, size_t params) {
  DELFAST_CHECK_VALUE(left == 0, "expected bits for ", params, " parameters, got ", left,
                      " bytes more; the mask is of other parameters");
}

// The parameters of a mask; a plan reads only their shapes.
inline std::vector<Updated> planned_list(const TensorList& param_tensors, const Tensor& bits, const BoolList& by_row) {
  const Device device = device_of(param_tensors.empty() ? bits : param_tensors.front());
  const size_t count = param_tensors.size();
  check_devices(device, param_tensors, "parameter");
  check_bits(device, bits, count, count, by_row.size());
  std::vector<Updated> params(count);
  for (size_t i = 0; i < count; i++) {
    params[i].param_dtype = dtype_of(param_tensors[i], "parameter #", i);
    params[i].layout = usable_layout(param_tensors[i]);
    params[i].by_row = by_row[i];
  }
  check_no_more_bits(place_bits(bits, params), count);
  return params;
}

// The parameters to change in place.
class UpdateList {
 public:
  UpdateList(const TensorList& param_tensors, const TensorList& sources, const Tensor& bits, const BoolList& by_row)
      : device(device_of(param_tensors.empty() ? bits : param_tensors.front())) {
    check_devices(device, param_tensors, "parameter");
    check_devices(device, sources, "gradient");
    const size_t count = param_tensors.size();
    check_bits(device, bits, count, sources.size(), by_row.size());
    params.reserve(count);
    changed_.reserve(count + 2);
    for (size_t i = 0; i < count; i++) {
      params.push_back(checked(param_tensors[i], sources[i], by_row[i], i));
      changed_.push_back(param_tensors[i]);
    }
    if (const int64_t left = place_bits(bits, params)) {
      const MaskPlanShape shape(params.data(), int64_t(count));
      if (left != shape.bytes() - shape.bit_bytes) check_no_more_bits(left, count);
      plan = bits.const_data_ptr<uint8_t>() + shape.head_offset();
      DELFAST_CHECK_VALUE(reinterpret_cast<uintptr_t>(plan) % 16 == 0,
                          "expected a plan to begin at a multiple of 16 bytes, got ", bits.storage_offset(),
                          " bytes into its storage; pass what masked_plan returned");
    }
  }

  // Adds another tensor that the update changes.
  void also_changes(const Tensor& t) { changed_.push_back(t); }
  // Call after the update.
  void finish() {
    copies_.write_back();
    increment_versions(changed_);
  }

  Device device;
  std::vector<Updated> params;
  const void* plan = nullptr;  // its head, if the bits are those of a plan

 private:
  Updated checked(const Tensor& param, const Tensor& source, bool by_row, size_t i) {
    DELFAST_CHECK_VALUE(source.sizes().equals(param.sizes()), "expected values for parameter #", i, " of shape ",
                        param.sizes(), ", got ", source.sizes(), "; pass them in the parameters' order");
    Updated u;
    u.param_dtype = dtype_of(param, "parameter #", i);
    u.source_dtype = dtype_of(source, "gradient #", i);
    u.layout = usable_layout(param);
    u.param = copies_.write(param, u.layout);
    u.source = copies_.read(source, u.layout);
    u.by_row = by_row;
    return u;
  }

  Copies copies_;
  TensorList changed_;
};

// Checks a one-element tensor that a step reads: grad_scale, found_inf or lr_tensor.
inline void check_number(Device device, const OptionalTensor& t, const char* role) {
  if (!t) return;
  check_device(device, *t, role);
  DELFAST_CHECK_VALUE(t->numel() == 1, "expected ", role, " to be one number, got shape ", t->sizes(),
                      "; pass a tensor of one element");
}

// Checks place and dtype of the state, and the tensors that a step reads besides the parameters. The host can count
// the entries that the state must have only on the CPU.
inline void check_step(const UpdateList& list, const Tensor& state, const Tensor& steps,
                       const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                       const OptionalTensor& lr_tensor) {
  check_device(list.device, state, "state");
  check_device(list.device, steps, "steps");
  DELFAST_CHECK_VALUE(type_of(state) == ScalarType::Float && state.dim() == 1 && state.is_contiguous(),
                      "expected state to be contiguous float32 (values,), got ", type_of(state), " ", state.sizes(),
                      "; the optimizer state is of another mask");
  const size_t params = list.params.size();
  DELFAST_CHECK_VALUE(type_of(steps) == ScalarType::Float && steps.dim() == 1 && steps.is_contiguous() &&
                          size_t(steps.numel()) == params,
                      "expected steps to be contiguous float32 (", params, ",), got ", type_of(steps), " ",
                      steps.sizes(), "; pass one counter per parameter");
  check_number(list.device, grad_scale, "grad_scale");
  check_number(list.device, found_inf, "found_inf");
  check_number(list.device, lr_tensor, "lr_tensor");
}

}  // namespace delfast::bindings
