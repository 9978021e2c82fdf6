// delfast::masked_plan and masked_{reset,sgd,adamw}_ on CUDA devices. If the bits are not part of a plan, a plan is
// made for the call. The host never waits for the device and therefore has neither the number of masked entries nor the
// value of found_inf. The device checks that state and plan fit the mask, and stops on a mismatch like a failed
// assertion in a kernel. Versions are incremented even where found_inf then prevents a change. Bits past a parameter's
// last are ignored.
#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"
#include "bindings/updates.h"

namespace delfast::bindings::on_cuda {

namespace {

class Step {
 public:
  Step(const TensorList& params, const TensorList& sources, const Tensor& bits, const BoolList& by_row)
      : list_(params, sources, bits, by_row), device_(list_.device) {}

  const Updated* params() const { return list_.params.data(); }
  int64_t count() const { return int64_t(list_.params.size()); }
  cuda::Stream stream() const { return device_.stream(); }
  void* workspace() { return memory(cuda::masked_update_workspace(count())); }
  const void* plan() {
    if (list_.plan || !count()) return list_.plan;
    const MaskPlanShape shape(params(), count());
    void* const plan = memory(shape.bytes() - shape.head_offset());
    check_launch(
        cuda::mask_plan(params(), count(), plan, memory(cuda::mask_plan_workspace(params(), count())), stream()),
        "masked_plan");
    return plan;
  }

  cuda::StepInputs inputs(const Tensor& state, const Tensor& steps, const OptionalTensor& grad_scale,
                          const OptionalTensor& found_inf, const OptionalTensor& lr_tensor) {
    check_step(list_, state, steps, grad_scale, found_inf, lr_tensor);
    list_.also_changes(state);
    list_.also_changes(steps);
    return {state.mutable_data_ptr<float>(),
            state.numel(),
            steps.mutable_data_ptr<float>(),
            number(grad_scale),
            number(found_inf),
            number(lr_tensor)};
  }

  void finish(cuda::Error error, const char* op) {
    check_launch(error, op);
    list_.finish();
  }

 private:
  const float* number(const OptionalTensor& t) {
    return t ? numbers_.emplace_back(torch::stable::to(*t, ScalarType::Float)).const_data_ptr<float>() : nullptr;
  }

  void* memory(int64_t bytes) {
    return workspaces_.emplace_back(device_.empty({bytes}, ScalarType::Byte)).mutable_data_ptr();
  }

  UpdateList list_;
  OnDevice device_;
  TensorList workspaces_;
  TensorList numbers_;
};

}  // namespace

Tensor masked_plan(const TensorList& params, const Tensor& bits, const BoolList& by_row) {
  const std::vector<Updated> list = planned_list(params, bits, by_row);
  const int64_t count = int64_t(list.size());
  const OnDevice device(device_of(bits));
  const MaskPlanShape shape(list.data(), count);
  // memory for the maximum number of pieces of any mask; zeroed, so that equal masks have equal plans
  Tensor plan = device.empty({shape.bytes()}, ScalarType::Byte);
  torch::stable::zero_(plan);
  Tensor plan_bits = torch::stable::narrow(plan, 0, 0, bits.numel());
  torch::stable::copy_(plan_bits, bits);
  const Tensor workspace = device.empty({cuda::mask_plan_workspace(list.data(), count)}, ScalarType::Byte);
  check_launch(cuda::mask_plan(list.data(), count, plan.mutable_data_ptr<uint8_t>() + shape.head_offset(),
                               workspace.mutable_data_ptr(), device.stream()),
               "masked_plan");
  return plan;
}

void masked_reset_(const TensorList& params, const TensorList& fresh, const Tensor& bits, const BoolList& by_row) {
  Step step(params, fresh, bits, by_row);
  step.finish(cuda::masked_reset(step.params(), step.count(), step.plan(), step.workspace(), step.stream()),
              "masked_reset_");
}

void masked_sgd_(const TensorList& params, const TensorList& grads, const Tensor& state, const Tensor& steps,
                 const Tensor& bits, const BoolList& by_row, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& lr_tensor) {
  Step step(params, grads, bits, by_row);
  const cuda::StepInputs inputs = step.inputs(state, steps, grad_scale, found_inf, lr_tensor);
  step.finish(
      cuda::masked_sgd(step.params(), step.count(), inputs, {lr, momentum, dampening, weight_decay, nesterov, maximize},
                       step.plan(), step.workspace(), step.stream()),
      "masked_sgd_");
}

void masked_adamw_(const TensorList& params, const TensorList& grads, const Tensor& state, const Tensor& steps,
                   const Tensor& bits, const BoolList& by_row, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf, const OptionalTensor& lr_tensor) {
  Step step(params, grads, bits, by_row);
  const cuda::StepInputs inputs = step.inputs(state, steps, grad_scale, found_inf, lr_tensor);
  step.finish(cuda::masked_adamw(step.params(), step.count(), inputs, {lr, beta1, beta2, eps, weight_decay, maximize},
                                 step.plan(), step.workspace(), step.stream()),
              "masked_adamw_");
}

}  // namespace delfast::bindings::on_cuda
