// The CPU entry points of every op, registered in register.cpp. The references in delfast/ops/reference define them;
// their schemas are in delfast/ops/schemas.py.
#pragma once

#include <string>
#include <tuple>

#include "bindings/torch.h"

namespace delfast::bindings {

Tensor criticality(const TensorList& theta, const TensorList& grad, const std::string& criterion,
                   const std::string& aggregate, const IntList& top_h);

std::tuple<Tensor, Tensor> select_elements(const TensorList& theta, const TensorList& grad,
                                           const std::string& criterion, int64_t k);
std::tuple<Tensor, Tensor> select_units(const Tensor& scores, const IntList& counts, const IntList& lengths, int64_t k,
                                        bool cut_last);

Tensor masked_plan(const TensorList& params, const Tensor& bits, const BoolList& by_row);
void masked_reset_(const TensorList& params, const TensorList& fresh, const Tensor& bits, const BoolList& by_row);
void masked_sgd_(const TensorList& params, const TensorList& grads, const Tensor& state, const Tensor& steps,
                 const Tensor& bits, const BoolList& by_row, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& lr_tensor);
void masked_adamw_(const TensorList& params, const TensorList& grads, const Tensor& state, const Tensor& steps,
                   const Tensor& bits, const BoolList& by_row, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf, const OptionalTensor& lr_tensor);

void per_example_accumulate_(const Tensor& sums, const Tensor& inputs, const Tensor& output_grad, const IntList& stride,
                             const IntList& padding, const IntList& dilation, int64_t groups,
                             const std::string& transform, bool allow_tf32);
Tensor channel_dot(const Tensor& output_grad, const OptionalTensor& values);
void channel_sums_(const TensorList& sums, const Tensor& output_grad, const OptionalTensor& values,
                   const OptionalTensor& mean, const OptionalTensor& variance, double eps,
                   const std::string& transform);

Tensor gather_columns(const Tensor& source, const Tensor& columns);
void write_rows_(const TensorList& weights, const TensorList& rows, const TensorList& indices, const IntList& dims);

}  // namespace delfast::bindings
