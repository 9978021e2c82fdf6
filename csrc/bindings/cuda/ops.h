// The CUDA entry points of every op, as registered in cuda/register.cpp: functions like the CPU's of bindings/ops.h.
#pragma once

#include "bindings/ops.h"

namespace delfast::bindings::on_cuda {

decltype(bindings::criticality) criticality;
decltype(bindings::select_elements) select_elements;
decltype(bindings::select_units) select_units;
decltype(bindings::masked_plan) masked_plan;
decltype(bindings::masked_reset_) masked_reset_;
decltype(bindings::masked_sgd_) masked_sgd_;
decltype(bindings::masked_adamw_) masked_adamw_;
decltype(bindings::per_example_accumulate_) per_example_accumulate_;
decltype(bindings::channel_dot) channel_dot;
decltype(bindings::channel_sums_) channel_sums_;
decltype(bindings::write_rows_) write_rows_;

}  // namespace delfast::bindings::on_cuda
