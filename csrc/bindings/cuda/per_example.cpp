// delfast::per_example_accumulate_, delfast::channel_dot and delfast::channel_accumulate_ on CUDA devices.
#include "bindings/per_example.h"

#include <ATen/Context.h>

#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"

namespace delfast::bindings::on_cuda {

namespace {

// As a matrix product of these would: 16 bits of one kind as they are, float32 where torch may round it to tf32. (The
// switch is named after cuBLAS, which is not used.)
bool use_tensor_cores(const PerExample& p) {
  if (p.inputs_dtype == p.deltas_dtype && p.inputs_dtype != Dtype::float32) return true;
  return at::globalContext().allowTF32CuBLAS();
}

}  // namespace

void per_example_accumulate_(const at::Tensor& sums, const at::Tensor& inputs, const at::Tensor& deltas,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             c10::string_view epilogue) {
  PerExampleOperands checked(sums, inputs, deltas, stride, padding, dilation, groups, epilogue);
  const OnDevice device(sums.device());
  const PerExample& p = checked.operands;
  const bool tensor_cores = use_tensor_cores(p);
  const at::Tensor workspace = device.empty({cuda::per_example_workspace(p, tensor_cores)}, at::kByte);
  check_launch(cuda::per_example_accumulate(p, tensor_cores, workspace.mutable_data_ptr(), device.stream()),
               "per_example_accumulate_");
  checked.finish();
}

at::Tensor channel_dot(const at::Tensor& deltas, const OptionalTensor& values) {
  ChannelDotOperands checked(deltas, values);
  const OnDevice device(deltas.device());
  ChannelDot& dot = checked.dot;
  at::Tensor out = device.empty({dot.examples, dot.channels}, at::kFloat);
  dot.out = out.mutable_data_ptr<float>();
  check_launch(cuda::channel_dot(dot, device.stream()), "channel_dot");
  return out;
}

void channel_accumulate_(at::TensorList sums, const at::Tensor& deltas, const OptionalTensor& values,
                         const OptionalTensor& mean, const OptionalTensor& variance, double eps,
                         c10::string_view epilogue) {
  ChannelSumsOperands checked(sums, deltas, values, mean, variance, eps, epilogue);
  const ChannelSums& p = checked.operands;
  if (!deltas.numel()) return checked.finish();
  const OnDevice device(deltas.device());
  const at::Tensor workspace = device.empty({cuda::channel_sums_workspace(p)}, at::kByte);
  check_launch(cuda::channel_sums(p, workspace.mutable_data_ptr(), device.stream()), "channel_accumulate_");
  checked.finish();
}

}  // namespace delfast::bindings::on_cuda
