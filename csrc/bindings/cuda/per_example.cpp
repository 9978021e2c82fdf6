// delfast::per_example_accumulate_, delfast::channel_dot and delfast::channel_sums_ on CUDA devices.
#include "bindings/per_example.h"

#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"

namespace delfast::bindings::on_cuda {

namespace {

// Operands of 16 bits and one dtype are multiplied unchanged; others only if they may be rounded to tf32.
bool use_tensor_cores(const PerExample& p, bool allow_tf32) {
  return allow_tf32 || (p.inputs_dtype == p.output_grad_dtype && p.inputs_dtype != Dtype::float32);
}

}  // namespace

void per_example_accumulate_(const Tensor& sums, const Tensor& inputs, const Tensor& output_grad, const IntList& stride,
                             const IntList& padding, const IntList& dilation, int64_t groups,
                             const std::string& transform, bool allow_tf32) {
  PerExampleOperands checked(sums, inputs, output_grad, stride, padding, dilation, groups, transform);
  const OnDevice device(device_of(sums));
  const PerExample& p = checked.operands;
  const bool tensor_cores = use_tensor_cores(p, allow_tf32);
  const Tensor workspace = device.empty({cuda::per_example_workspace(p, tensor_cores)}, ScalarType::Byte);
  check_launch(cuda::per_example_accumulate(p, tensor_cores, workspace.mutable_data_ptr(), device.stream()),
               "per_example_accumulate_");
  checked.finish();
}

Tensor channel_dot(const Tensor& output_grad, const OptionalTensor& values) {
  ChannelDotOperands checked(output_grad, values);
  const OnDevice device(device_of(output_grad));
  ChannelDot& dot = checked.dot;
  Tensor out = device.empty({dot.examples, dot.channels}, ScalarType::Float);
  dot.out = out.mutable_data_ptr<float>();
  check_launch(cuda::channel_dot(dot, device.stream()), "channel_dot");
  return out;
}

void channel_sums_(const TensorList& sums, const Tensor& output_grad, const OptionalTensor& values,
                   const OptionalTensor& mean, const OptionalTensor& variance, double eps,
                   const std::string& transform) {
  ChannelSumsOperands checked(sums, output_grad, values, mean, variance, eps, transform);
  const ChannelSums& p = checked.operands;
  if (!output_grad.numel()) return checked.finish();
  const OnDevice device(device_of(output_grad));
  const Tensor workspace = device.empty({cuda::channel_sums_workspace(p)}, ScalarType::Byte);
  check_launch(cuda::channel_sums(p, workspace.mutable_data_ptr(), device.stream()), "channel_sums_");
  checked.finish();
}

}  // namespace delfast::bindings::on_cuda
