// The CPU entry points of every op, as registered in module.cpp. Their meaning is their references' in
// delfast/ops/reference; their schemas are in delfast/ops/table.py.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <tuple>

namespace delfast::bindings {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor criticality(at::TensorList theta, at::TensorList grad, c10::string_view criterion,
                       c10::string_view aggregate, at::IntArrayRef top_h);

std::tuple<at::Tensor, at::Tensor> select_elements(at::TensorList theta, at::TensorList grad,
                                                   c10::string_view criterion, int64_t k);
std::tuple<at::Tensor, at::Tensor> select_units(const at::Tensor& scores, at::IntArrayRef counts,
                                                at::IntArrayRef lengths, int64_t k, bool cut_last);

at::Tensor masked_plan(at::TensorList params, const at::Tensor& bits, const c10::List<bool>& by_row);
void masked_reset_(at::TensorList params, at::TensorList fresh, const at::Tensor& bits, const c10::List<bool>& by_row);
void masked_sgd_(at::TensorList params, at::TensorList grads, const at::Tensor& state, const at::Tensor& steps,
                 const at::Tensor& bits, const c10::List<bool>& by_row, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& lr_tensor);
void masked_adamw_(at::TensorList params, at::TensorList grads, const at::Tensor& state, const at::Tensor& steps,
                   const at::Tensor& bits, const c10::List<bool>& by_row, double lr, double beta1, double beta2,
                   double eps, double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf, const OptionalTensor& lr_tensor);

void per_example_accumulate_(const at::Tensor& sums, const at::Tensor& inputs, const at::Tensor& deltas,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             c10::string_view epilogue);
at::Tensor channel_dot(const at::Tensor& deltas, const OptionalTensor& values);
void channel_accumulate_(at::TensorList sums, const at::Tensor& deltas, const OptionalTensor& values,
                         const OptionalTensor& mean, const OptionalTensor& variance, double eps,
                         c10::string_view epilogue);

at::Tensor gather_columns(const at::Tensor& source, const at::Tensor& columns);
void write_rows_(at::TensorList weights, at::TensorList rows, at::TensorList indices, at::IntArrayRef dims);

}  // namespace delfast::bindings
